//! Links the bootable image with its own linker script.

use std::path::Path;

fn main() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/hw/boot/image.ld");
    println!("cargo:rerun-if-changed={}", script.display());
    let bare_metal = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none");
    if bare_metal && std::env::var_os("CARGO_FEATURE_IMAGE").is_some() {
        println!("cargo:rustc-link-arg-bin=nvmx=-T{}", script.display());
        // The image has fixed addresses; pages of 4 KiB keep file offsets linear with addresses.
        println!("cargo:rustc-link-arg-bin=nvmx=-no-pie");
        println!("cargo:rustc-link-arg-bin=nvmx=-zmax-page-size=4096");
    }
}
