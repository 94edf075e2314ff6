//! Frames, pools, and L2's memory by Gpa.
