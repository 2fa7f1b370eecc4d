#!/usr/bin/env python
"""Trains or evaluates a detector, with or without a teacher. See ``--help`` and the README."""

from d2kd.engine.launch import main

if __name__ == "__main__":
    main()
