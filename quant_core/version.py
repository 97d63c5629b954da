"""The release this code belongs to; part of every fingerprint."""

VERSION = "0.1.0"
