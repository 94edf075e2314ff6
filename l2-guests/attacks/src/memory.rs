//! Structures in the memory of the hypervisor below, across its edges and beside it.

mod controls;
mod guest_side;
mod pointers;
mod sub_pages;
mod tables;

use crate::{
    guest::{self, Exit, Extra},
    lab::{Lab, Seen, Told},
    place::{self, Place},
};
use l2_kit::{fields as f, vmx};

/// All of them.
pub fn all(lab: &mut Lab) {
    pointers::all(lab);
    controls::all(lab);
    tables::all(lab);
    sub_pages::all(lab);
    guest_side::all(lab);
}

/// Tries something with an address in each place: inside, where it only has to be answered, and beside, where it is memory
/// like any other.
fn everywhere(lab: &mut Lab, name: &str, mut attempt: impl FnMut(&mut Lab, u64) -> Seen) {
    for place in Place::INSIDE {
        lab.attack(format_args!("{name} {}", place.name()), Told::Answered, |lab| {
            let page = place.page(lab.random.next());
            place::fill(page);
            attempt(lab, page)
        });
    }
    for place in Place::BESIDE {
        lab.attack(format_args!("{name} {}", place.name()), Told::Same, |lab| {
            lab.beside = true;
            let page = place.page(0);
            // SAFETY: ordinary memory that this guest uses for nothing else.
            unsafe { l2_kit::pages::at(page) }.fill(0);
            attempt(lab, page)
        });
    }
}

/// What an access of L3 came to. Where the memory is nvmx's, a program that comes to its end has reached it.
fn no_end_inside(exit: Exit, at: u64) -> Seen {
    let (start, end) = place::range();
    let inside = (start..end).contains(&at) && !place::is_bare();
    Seen::of(exit).escaped_if(inside && matches!(exit, Exit::Done(_)))
}

/// The guest with these controls; all its exceptions exit.
fn with(lab: &mut Lab, extra: Extra) {
    lab.with(extra);
    vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
}

/// Runs nothing.
fn enter(lab: &mut Lab) -> Exit {
    lab.execute(guest::nothing, 1)
}
