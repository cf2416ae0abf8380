"""Pushing while training: only what belongs to the model goes, and no token is written."""

import logging

logger = logging.getLogger(__name__)
