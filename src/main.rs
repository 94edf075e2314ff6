//! The nvmx image: from the loader to the first instruction of L2.
#![no_std]
#![no_main]

use core::panic::PanicInfo;

use log::{LevelFilter, error, info};
use nvmx::{
    boot::Options,
    hw::{
        boot::Handover,
        epitaph::{self, Status},
        serial,
    },
};

nvmx::entry_point!(main);

fn main(handover: Handover) -> ! {
    serial::init(LevelFilter::Info);
    let info = match handover.info() {
        Ok(i) => i,
        Err(e) => {
            error!("{e}");
            epitaph::end(Status::Fail)
        }
    };
    match Options::parse(&info.command_line) {
        Ok(options) => {
            log::set_max_level(options.log);
            epitaph::configure(options.exit);
        }
        Err(e) => {
            error!("{e}");
            epitaph::end(Status::Fail)
        }
    }
    match handover.settle(&info, 0, false) {
        Ok(home) => info!("settled at {}", home.own),
        Err(e) => error!("{e}"),
    }
    epitaph::end(Status::Fail)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    epitaph::panic(info)
}
