"""Celery settings of Flower, which is no part of ours: it loads this by ``CELERY_CONFIG_MODULE``."""

from shared.broker import celery_config
from shared.settings import load_settings

globals().update(celery_config(load_settings()))
