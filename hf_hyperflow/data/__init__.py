"""Labelled images as domains, few-shot episodes and training tasks."""
