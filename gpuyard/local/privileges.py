"""Running a command as another account, for the one server that refuses to be root."""

from __future__ import annotations

import pwd
import shutil
from collections.abc import Sequence
from pathlib import Path

from shared.errors import ConfigurationError

# Number in linux/capability.h and name of what lets a user pass folders that are closed to others,
# the narrower first; containers often have only the second.
_READ_ANYWHERE = ((2, "dac_read_search"), (1, "dac_override"))


def as_account(command: Sequence[str], account: pwd.struct_passwd | None) -> list[str]:
    """The command line that runs ``command`` as ``account`` (None: as it is).

    The program and its data may lie below a home folder that is closed to others. Instead of
    opening it to everybody, the process keeps the one capability to pass through;
    ``no_setuid_fixup`` because access(2), by which Postgres looks for its own binary, otherwise
    leaves capabilities out of account.

    Raises:
        ConfigurationError: ``setpriv`` (util-linux) is missing.
    """
    if account is None:
        return list(command)
    setpriv = shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin")
    if setpriv is None:
        raise ConfigurationError(
            "Postgres may not run as root, and setpriv (util-linux) is not there to change users",
            hint="Run as an ordinary user, or set DATABASE_URL.",
        )
    switch = [setpriv, f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    # A change of user drops the death signal that the launcher asked for, so it is asked again.
    switch += ["--pdeathsig=INT"]
    held = _permitted_capabilities()
    for number, name in _READ_ANYWHERE:
        if held >> number & 1:
            only = f"-all,+{name}"
            switch += ["--securebits=+no_setuid_fixup", f"--bounding-set={only}"]
            switch += [f"--inh-caps={only}", f"--ambient-caps={only}"]
            break
    return [*switch, *command]


def _permitted_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0
