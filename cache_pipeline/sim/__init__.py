"""Runs policies and scripted experts in robosuite."""
