//! The guest's memory.

use crate::multiboot::{self, File, Start};
use crate::plan::{Item, Plan};
use crate::{acpi, linux};
use anyhow::{Context, Result};
use memmap2::MmapMut;

/// The memory, with everything loaded.
pub struct Guest {
    /// Zero bytes but for what was loaded
    pub memory: MmapMut,
    /// Where it starts
    pub start: Start,
}

impl Guest {
    /// Makes memory and loads the plan's files into it.
    ///
    /// # Errors
    /// If a file cannot be read or does not fit.
    pub fn load(plan: &Plan) -> Result<Self> {
        let size = usize::try_from(plan.memory)? << 20;
        let mut memory = MmapMut::map_anon(size).context("no memory for the guest")?;
        let read = |item: &Item| std::fs::read(&item.path).with_context(|| format!("cannot read {}", item.path));
        let kernel = read(&plan.kernel)?;
        let payloads = plan.payloads.iter().map(read).collect::<Result<Vec<_>>>()?;
        let modules: Vec<File<'_>> =
            payloads.iter().zip(&plan.payloads).map(|(data, item)| File { data, line: &item.args }).collect();
        let file = File { data: &kernel, line: &plan.kernel.args };
        let start = match linux::is_kernel(&kernel) {
            true => linux::load(&mut memory, &file, &modules)?,
            false => multiboot::load(&mut memory, &file, &modules)?,
        };
        multiboot::put(&mut memory, acpi::PLACE as usize, &acpi::tables(plan.cpus.try_into()?))?;
        Ok(Guest { memory, start })
    }
}
