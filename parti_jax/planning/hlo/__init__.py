"""Reads compiled HLO: what a step computes, moves and sends."""
