"""Detectors that turn images into the ``Found`` of the rules.

``shapes`` is the one of the embedded world, ``mask2former`` the one for photographs.
"""
