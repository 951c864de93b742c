"""Replicate Media Service: the durable layer between an application and Replicate."""

__version__ = "1.0.0"
