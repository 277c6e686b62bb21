"""Behaviour that every implementation of a seam must have, whichever it is."""
