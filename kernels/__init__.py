"""fastlm's Triton kernels; imported as fastlm.kernels."""
