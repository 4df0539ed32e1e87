"""Candidates that are built on one machine and measured on another one, which has a GPU and no Python ``tvm``."""
