//! Where variables live.

use crate::error::At;
use crate::ptx::{Address, Function, Module, Operand, Space, Statement, Variable};
use std::collections::{HashMap, HashSet};

/// Addresses of a module's global and constant variables.
pub type Symbols = HashMap<String, u64>;

/// Where shared memory begins in its window: the system keeps what lies before.
pub const SHARED_BASE: u64 = 1024;
/// Where local memory begins in its window.
pub const LOCAL_BASE: u64 = 0x100;

/// The next multiple of a power of two.
pub fn align_up(value: u32, align: u32) -> u32 {
    value.div_ceil(align) * align
}

/// Static and dynamic shared variables of a kernel and of what it calls.
#[derive(Debug, Default)]
pub struct Shared {
    module: HashMap<String, u64>,
    functions: HashMap<(String, String), u64>,
    bytes: u32,
}

impl Shared {
    /// Lays out what a kernel refers to.
    pub fn new(module: &Module, entry: &Function, functions: &HashMap<&str, &Function>) -> Result<Self, At> {
        let mut used = HashSet::new();
        let mut seen = HashSet::from([entry.name.as_str()]);
        let mut open = vec![entry];
        let mut declared = Vec::new();
        while let Some(function) = open.pop() {
            let mut names = HashSet::new();
            for statement in function.body.iter().flatten() {
                visit(statement, &mut names, &mut |variable| declared.push((function.name.clone(), variable.clone())));
            }
            for name in &names {
                if let Some(called) = functions.get(name).filter(|called| seen.insert(called.name.as_str())) {
                    open.push(called);
                }
            }
            used.extend(names);
        }
        let mut shared = Self::default();
        let ours = module.variables.iter().filter(|v| v.space == Space::Shared && used.contains(v.name.as_str()));
        let (dynamic, fixed): (Vec<_>, Vec<_>) = ours.partition(|variable| variable.bytes == 0);
        for variable in fixed {
            let at = shared.take(variable, entry.line)?;
            shared.module.insert(variable.name.clone(), at);
        }
        for (function, variable) in declared {
            let at = shared.take(&variable, entry.line)?;
            shared.functions.insert((function, variable.name), at);
        }
        let align = dynamic.iter().map(|variable| variable.align as u32).fold(16, u32::max);
        if !dynamic.is_empty() {
            shared.bytes = align_up(shared.bytes, align.min(1024));
        }
        for variable in dynamic {
            shared.module.insert(variable.name.clone(), SHARED_BASE + u64::from(shared.bytes));
        }
        Ok(shared)
    }

    fn take(&mut self, variable: &Variable, line: u32) -> Result<u64, At> {
        let at = align_up(self.bytes, variable.align.clamp(1, 1024) as u32);
        let bytes = u32::try_from(variable.bytes).ok().filter(|bytes| *bytes <= 1 << 20);
        let Some(bytes) = bytes else { return Err(At::new(line, format!("`{}` is too large", variable.name))) };
        self.bytes = at.saturating_add(bytes);
        Ok(SHARED_BASE + u64::from(at))
    }

    /// A variable of the module.
    pub fn of_module(&self, name: &str) -> Option<u64> {
        self.module.get(name).copied()
    }

    /// A variable within a function.
    pub fn of_function(&self, function: &str, name: &str) -> Option<u64> {
        self.functions.get(&(function.to_owned(), name.to_owned())).copied()
    }

    /// Bytes of static shared memory; dynamic memory begins behind them.
    pub fn bytes(&self) -> u32 {
        self.bytes
    }
}

/// Visits names and shared variables of a statement.
fn visit<'a>(statement: &'a Statement, names: &mut HashSet<&'a str>, shared: &mut impl FnMut(&'a Variable)) {
    match statement {
        Statement::Block(inner) => inner.iter().for_each(|statement| visit(statement, names, shared)),
        Statement::Variable(variable) if variable.space == Space::Shared => shared(variable),
        Statement::Instruction(instruction) => {
            instruction.operands.iter().for_each(|operand| visit_operand(operand, names));
        }
        _ => {}
    }
}

fn visit_operand<'a>(operand: &'a Operand, names: &mut HashSet<&'a str>) {
    match operand {
        Operand::Name(name, _) => {
            names.insert(name);
        }
        Operand::Address(Address { base: Some(name), .. }) => {
            names.insert(name);
        }
        Operand::Vector(parts) | Operand::List(parts) => parts.iter().for_each(|part| visit_operand(part, names)),
        _ => {}
    }
}
