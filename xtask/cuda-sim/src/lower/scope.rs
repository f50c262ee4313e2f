//! Names: what they mean where.

use super::layout::{LOCAL_BASE, align_up};
use super::{Lower, class_of};
use crate::code::{MaskKind, Special};
use crate::error::At;
use crate::exec::regs::Reg;
use crate::ptx::{Space, Type, Variable};
use std::collections::HashMap;

/// What a name means.
#[derive(Clone, Debug)]
pub enum Binding {
    /// A register and its bits.
    Register(Reg, u32),
    /// A label's number.
    Label(usize),
    /// Targets of `brx.idx`.
    Targets(Vec<String>),
    /// A variable's address in its space.
    Address(Space, u64),
    /// An entry's parameter.
    Param(u32),
}

/// Scopes, the innermost last.
#[derive(Default)]
pub struct Scopes {
    open: Vec<(bool, HashMap<String, Binding>)>,
}

impl Scopes {
    /// Opens a scope; those outside a function's are not seen from within it.
    pub fn enter(&mut self, function: bool) {
        self.open.push((function, HashMap::new()));
    }

    /// Closes the innermost scope.
    pub fn leave(&mut self) {
        self.open.pop();
    }

    /// Gives a name a meaning in the innermost scope.
    pub fn bind(&mut self, name: &str, binding: Binding) {
        if let Some((_, names)) = self.open.last_mut() {
            names.insert(name.to_owned(), binding);
        }
    }

    /// What a name means here.
    pub fn find(&self, name: &str) -> Option<&Binding> {
        for (function, names) in self.open.iter().rev() {
            if let Some(found) = names.get(name) {
                return Some(found);
            }
            if *function {
                break;
            }
        }
        None
    }
}

impl Lower<'_> {
    /// `.reg`
    pub(super) fn declare_registers(&mut self, ty: Type, names: &[(String, Option<u32>)]) -> Result<(), At> {
        if ty.bits == 128 {
            return self.fail("registers of 128 bits are not supported");
        }
        for (name, count) in names {
            match count {
                None => {
                    let reg = self.new_reg(class_of(ty));
                    self.scopes.bind(name, Binding::Register(reg, ty.bits));
                }
                Some(count) => {
                    for number in 0..*count {
                        let reg = self.new_reg(class_of(ty));
                        self.scopes.bind(&format!("{name}{number}"), Binding::Register(reg, ty.bits));
                    }
                }
            }
        }
        Ok(())
    }

    /// A variable within a function.
    pub(super) fn declare_variable(&mut self, variable: &Variable) -> Result<(), At> {
        let address = match variable.space {
            Space::Shared => {
                let function = self.stack.last().map_or("", |frame| frame.0);
                match self.shared.of_function(function, &variable.name) {
                    Some(offset) => offset,
                    None => return self.fail(format!("`{}` has no place in shared memory", variable.name)),
                }
            }
            Space::Local | Space::Param => self.local_variable(variable.bytes, variable.align)?,
            _ => return self.fail(format!("`{}`: only .local, .shared and .param are supported here", variable.name)),
        };
        if !variable.init.is_empty() {
            return self.fail("first values of a function's variable");
        }
        let space = if variable.space == Space::Param { Space::Local } else { variable.space };
        self.scopes.bind(&variable.name, Binding::Address(space, address));
        Ok(())
    }

    /// Local memory for a variable.
    pub(super) fn local_variable(&mut self, bytes: u64, align: u64) -> Result<u64, At> {
        let offset = u64::from(align_up(self.local_bytes, align.clamp(1, 256) as u32));
        if offset + bytes > 1 << 19 {
            return self.fail("more than 512 KiB of local memory");
        }
        self.local_bytes = (offset + bytes) as u32;
        Ok(LOCAL_BASE + offset)
    }

    /// A variable's address in its space.
    pub(super) fn variable_address(&mut self, name: &str) -> Result<Option<u64>, At> {
        Ok(match self.scopes.find(name) {
            Some(Binding::Address(_, address)) => Some(*address),
            Some(Binding::Param(offset)) => Some(u64::from(*offset)),
            Some(_) => None,
            None => self.shared.of_module(name).or_else(|| self.symbols.get(name).copied()),
        })
    }

    /// Whether a name is a call's parameter rather than the entry's.
    pub(super) fn is_local_param(&self, name: Option<&str>) -> bool {
        matches!(name.and_then(|name| self.scopes.find(name)), Some(Binding::Address(Space::Local, _)))
    }
}

/// A special register and its bits.
pub fn special(name: &str) -> Option<(Special, u32)> {
    let axis = |axis: &str| match axis {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    if let Some((base, part)) = name.split_once('.') {
        let axis = axis(part)?;
        let special = match base {
            "%tid" => Special::Tid(axis),
            "%ntid" => Special::Ntid(axis),
            "%ctaid" => Special::Ctaid(axis),
            "%nctaid" => Special::Nctaid(axis),
            "%clusterid" => Special::Ctaid(axis),
            "%nclusterid" => Special::Nctaid(axis),
            "%cluster_ctaid" => Special::Fixed(0),
            "%cluster_nctaid" => Special::Fixed(1),
            _ => return None,
        };
        return Some((special, 32));
    }
    let special = match name {
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%nwarpid" => Special::Warps,
        "%smid" => Special::Sm,
        "%nsmid" => Special::Sms,
        "%gridid" => return Some((Special::Grid, 64)),
        "%lanemask_eq" => Special::LaneMask(MaskKind::Equal),
        "%lanemask_lt" => Special::LaneMask(MaskKind::Below),
        "%lanemask_le" => Special::LaneMask(MaskKind::UpTo),
        "%lanemask_gt" => Special::LaneMask(MaskKind::Above),
        "%lanemask_ge" => Special::LaneMask(MaskKind::From),
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        "%cluster_ctarank" => Special::Fixed(0),
        "%cluster_nctarank" => Special::Fixed(1),
        "%is_explicit_cluster" => return None,
        "WARP_SZ" => Special::Fixed(32),
        _ => return None,
    };
    Some((special, 32))
}
