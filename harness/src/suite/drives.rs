//! The boot tests of L2s that come from a drive: a CD and a disk with GRUB, which loads `cascade` as on a machine of its own.

use super::{Case, Suite, compare};
use crate::backend::{Drive, Medium, Protocol, Spec, iso};
use crate::l2;
use crate::session::Session;
use anyhow::Result;
use std::path::PathBuf;

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    for (name, medium) in [("cascade-cd", Medium::Cd), ("cascade-disk", Medium::Disk)] {
        let made = if session.dry { Ok(PathBuf::new()) } else { image(session) };
        let both = made.and_then(|path| specs(session, name, Drive { path, medium }));
        let (bare, nested) = match both {
            Ok((bare, nested)) => (Ok(bare), Ok(nested)),
            Err(error) => (Err(format!("{error:#}")), Err(format!("{error:#}"))),
        };
        suite.boots.insert(format!("{name}-bare"), bare);
        suite.boots.insert(name.into(), nested);
        let what = if medium == Medium::Cd { "CD" } else { "disk" };
        suite.cases.push(Case {
            name: format!("cascade that GRUB loads from a {what} sees under nvmx what it sees bare"),
            boots: vec![format!("{name}-bare"), name.into()],
            judge: Box::new(|o| compare::agree(o[0], o[1])),
        });
    }
}

/// What `grub-mkrescue` makes boots as a CD and as a disk.
fn image(session: &Session) -> Result<PathBuf> {
    let folder = session.paths.target.join("nvmx/drives");
    std::fs::create_dir_all(&folder)?;
    iso::make(&session.bare("cascade", "events=20")?, &folder, iso::Platform::Bios)
}

fn specs(session: &Session, name: &str, drive: Drive) -> Result<(Spec, Spec)> {
    let bare = session.bare("cascade", "")?;
    let bare = Spec { name: format!("{name}-bare"), protocol: Protocol::Firmware, drive: Some(drive.clone()), ..bare };
    let nested = session.under_nvmx(&bare, name.into(), "log=info");
    let sector = if session.dry { bare.kernel.clone() } else { l2::boot_sector(session, &drive, name)? };
    Ok((bare, Spec { modules: vec![sector], ..nested }))
}
