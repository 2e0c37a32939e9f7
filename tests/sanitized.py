"""A pytest plugin: fastlm._C comes from the file that FASTLM_SANITIZED names (test_sanitizers.py builds it)."""

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("fastlm._C", os.environ["FASTLM_SANITIZED"])
sys.modules["fastlm._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastlm._C"])
