//! Tests of what the kernel programs decide.
