//! Instructions of kernels, counted in what nvdisasm prints.

use anyhow::{Context, Result, ensure};
use cuda_sim::toolchain::Toolchain;
use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

/// Instructions of a kernel as they stand in its code, loops once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All.
    pub instructions: usize,
    /// Products on tensor cores: HMMA, HGMMA and those of other types.
    pub mma: usize,
    /// LDSM: matrices from shared memory to registers.
    pub matrix_loads: usize,
    /// LDGSTS: copies to shared memory past registers.
    pub copies: usize,
    /// UBLKCP, UTMALDG and the like: copies of whole tiles.
    pub bulk_copies: usize,
}

/// Of each kernel in a file of machine code.
///
/// # Errors
/// If nvdisasm does not start, or refuses the file.
pub fn counts(toolchain: &Toolchain, binary: &Path) -> Result<HashMap<String, Counts>> {
    let program = toolchain.program("nvdisasm");
    let output = Command::new(&program).arg("-c").arg(binary).output();
    let output = output.with_context(|| format!("{} does not start", program.display()))?;
    ensure!(output.status.success(), "nvdisasm: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(read(&String::from_utf8_lossy(&output.stdout)))
}

fn read(text: &str) -> HashMap<String, Counts> {
    let mut found: HashMap<String, Counts> = HashMap::new();
    let mut kernel = None;
    for line in text.lines() {
        if let Some(name) = line.trim().strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            kernel = Some(name.to_owned());
        }
        let (Some(kernel), Some(opcode)) = (&kernel, opcode(line)) else { continue };
        let counts = found.entry(kernel.clone()).or_default();
        counts.instructions += 1;
        match opcode {
            "HMMA" | "HGMMA" | "IMMA" | "IGMMA" | "DMMA" | "QMMA" | "QGMMA" | "UTCHMMA" => counts.mma += 1,
            "LDSM" => counts.matrix_loads += 1,
            "LDGSTS" => counts.copies += 1,
            "UBLKCP" | "UTMALDG" | "UTMASTG" | "UTMAREDG" | "UBLKRED" => counts.bulk_copies += 1,
            _ => {}
        }
    }
    found
}

/// The opcode of a line such as `/*0010*/  @!P0 LDG.E.128 R4, [R2] ;`, without its modifiers.
fn opcode(line: &str) -> Option<&str> {
    let (address, rest) = line.trim().strip_prefix("/*")?.split_once("*/")?;
    address.chars().all(|c| c.is_ascii_hexdigit()).then_some(())?;
    let word = rest.split_whitespace().find(|word| !word.starts_with('@') && *word != "{")?;
    let opcode = word.split(['.', ';']).next()?;
    opcode.starts_with(|c: char| c.is_ascii_uppercase()).then_some(opcode)
}

#[cfg(test)]
mod tests {
    use super::{Counts, read};

    #[test]
    fn instructions_are_counted_by_kernel() {
        let text = ".text.first:\n.L_x:\n        /*0000*/                   LDC R1, c[0x0][0x28] ;\n\
                    \t/*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;\n\
                    \t/*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;  /* 0x0 */\n\
                    .text.second:\n\t/*0000*/    LDSM.16.M88.4 R4, [R2] ;\n\t/*0010*/    UBLKCP [UR6], [UR4], UR8 ;\n";
        let found = read(text);
        let first = Counts { instructions: 3, mma: 1, copies: 1, ..Counts::default() };
        assert_eq!(found["first"], first);
        assert_eq!(found["second"], Counts { instructions: 2, matrix_loads: 1, bulk_copies: 1, ..Counts::default() });
    }
}
