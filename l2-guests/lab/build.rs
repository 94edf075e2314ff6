//! Links the guest as all guests are.

include!("../kit/guest_build.rs");
