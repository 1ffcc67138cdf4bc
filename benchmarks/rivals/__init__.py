"""Tuili and the other CPU engines beside each other: one protocol, one file per rival (`make bench-rivals`).

``run.py`` runs it, ``report.py`` makes the tables; docs/rivals.md tells what is compared and how. Nothing here imports
a rival: ``worker.py`` does, in that rival's own environment.
"""
