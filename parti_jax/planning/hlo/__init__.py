"""Reads compiled HLO, to find what a step computes, moves and sends."""
