"""Rows made while the student trains: who makes which, when, and with which weights."""
