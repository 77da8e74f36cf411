"""Refiners: whole tracks to better tracks."""
