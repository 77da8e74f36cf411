"""What is wrong with a set-up, in plain words: ``python -m vis.doctor [--config-file C] [KEY VALUE ...]``.

This package imports nothing but the standard library, and :mod:`vis.engine.doctor.packages` neither: a machine where
packages are missing is one that needs it.
"""
