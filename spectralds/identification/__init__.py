"""Identification of symmetric linear dynamical systems from inputs and outputs."""
