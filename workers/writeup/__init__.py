"""What a training leaves for people: the report page, the model card, ``metrics.csv``, TensorBoard events.

Everything is a function of ``Facts``; nothing here knows torch. Begin with ``facts.py`` and ``page.py``.
"""
