#!/usr/bin/env python
"""Trains or evaluates a detector, with or without a teacher: ``d2kd train``, at the place where
users of Detectron2 look for it. See ``--help`` and the README."""

from d2kd.cli.main import train

if __name__ == "__main__":
    train()
