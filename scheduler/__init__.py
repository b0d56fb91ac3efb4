"""The part that decides: API and submission, admission, placement, dispatch, rescue, leadership."""
