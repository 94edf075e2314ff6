//! The nested core on a model of a machine: nvmx from its run loop down, with guests that are async functions. What a guest sees
//! on the bare machine it must see under nvmx, by every strategy.

mod events;
mod faults;
mod images;
mod instructions;
mod kit;
mod lent;
mod machine_checks;
mod memory;
mod operands;
mod own;
mod random;
mod slots;
mod trace;
mod transitions;
mod usual;
