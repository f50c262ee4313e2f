//! How many CTAs a multiprocessor holds.

use super::device::{Profile, SHARED_RESERVED};

/// Registers of a multiprocessor.
const REGISTERS: u32 = 65536;
/// Registers are given to a warp in such units.
const REGISTER_UNIT: u32 = 256;
/// Warps of a multiprocessor.
const WARPS: u32 = 64;
/// CTAs of a multiprocessor.
const CTAS: u32 = 32;
/// Quarters of a multiprocessor, each with its own registers.
const QUARTERS: u32 = 4;
/// Shared memory is given in such units.
const SHARED_UNIT: u32 = 128;

/// CTAs that fit, for CTAs of so many threads, registers a thread and bytes of shared memory.
pub fn active_ctas(device: &Profile, threads: u32, registers: u32, shared_bytes: u32) -> u32 {
    if threads == 0 || threads > 1024 {
        return 0;
    }
    let warps = threads.div_ceil(32);
    let by_warps = (WARPS / warps).min(CTAS);
    let by_registers = if registers == 0 { CTAS } else { warps_by_registers(registers) / warps };
    let shared = (shared_bytes + SHARED_RESERVED).next_multiple_of(SHARED_UNIT);
    let by_shared = device.shared_multiprocessor / shared;
    by_warps.min(by_registers).min(by_shared)
}

/// Warps whose registers a multiprocessor holds.
fn warps_by_registers(registers: u32) -> u32 {
    let of_warp = (registers * 32).next_multiple_of(REGISTER_UNIT);
    REGISTERS / QUARTERS / of_warp * QUARTERS
}

/// Whether a multiprocessor has the registers of a CTA.
pub fn registers_suffice(threads: u32, registers: u32) -> bool {
    registers == 0 || threads.div_ceil(32) <= warps_by_registers(registers)
}
