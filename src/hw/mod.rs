//! The only place with unsafe code: instructions, registers, boot.
