//! A module on a device: its variables in memory, its kernels lowered.

use crate::code::Kernel;
use crate::error::{At, PtxError};
use crate::lower::{self, Symbols};
use crate::memory::{DeviceMemory, MemoryError};
use crate::ptx::{self, Init, Space, Variable};
use std::collections::HashMap;
use thiserror::Error;

/// Why a module cannot be loaded.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LoadError {
    /// The PTX.
    #[error(transparent)]
    Ptx(#[from] PtxError),
    /// No memory for its variables.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A loaded module.
#[derive(Debug)]
pub struct Module {
    /// `.version`, major and minor.
    pub version: (u32, u32),
    /// `.target`
    pub target: String,
    /// Kernels by name.
    pub kernels: HashMap<String, Kernel>,
    /// Global and constant variables: address and bytes.
    pub variables: HashMap<String, (u64, u64)>,
}

impl Module {
    /// Loads PTX text.
    ///
    /// # Errors
    /// The PTX is wrong or not supported, or the memory is full.
    pub fn load(source: &str, memory: &DeviceMemory) -> Result<Self, LoadError> {
        let parsed = ptx::parse(source)?;
        let mut module = Self {
            version: parsed.version,
            target: parsed.target.clone(),
            kernels: HashMap::new(),
            variables: HashMap::new(),
        };
        let kept = |variable: &&Variable| matches!(variable.space, Space::Global | Space::Const);
        let result = module.place(parsed.variables.iter().filter(kept), memory).and_then(|()| {
            let symbols: Symbols = module.variables.iter().map(|(name, place)| (name.clone(), place.0)).collect();
            Ok(lower::kernels(&parsed, &symbols).map_err(|at| at.in_source(source))?)
        });
        match result {
            Ok(kernels) => {
                module.kernels = kernels.into_iter().map(|kernel| (kernel.name.clone(), kernel)).collect();
                Ok(module)
            }
            Err(error) => {
                module.unload(memory);
                Err(error)
            }
        }
    }

    fn place<'v>(
        &mut self,
        variables: impl Iterator<Item = &'v Variable> + Clone,
        memory: &DeviceMemory,
    ) -> Result<(), LoadError> {
        for variable in variables.clone() {
            if variable.external {
                let what = format!("`{}` is external: modules are not linked", variable.name);
                return Err(At::new(0, what).in_source("").into());
            }
            let address = memory.allocate(variable.bytes, variable.space == Space::Const)?;
            self.variables.insert(variable.name.clone(), (address, variable.bytes));
        }
        for variable in variables {
            let bytes = self.initial(variable)?;
            memory.copy_in(self.variables[&variable.name].0, &bytes)?;
        }
        Ok(())
    }

    /// A variable's first bytes; those without a value are zero.
    fn initial(&self, variable: &Variable) -> Result<Vec<u8>, LoadError> {
        let mut bytes = Vec::with_capacity(variable.bytes as usize);
        for value in &variable.init {
            let bits = match value {
                Init::Bits(bits) => *bits,
                Init::Address(name, offset, _) => match self.variables.get(name) {
                    Some((address, _)) => address.wrapping_add(*offset as u64),
                    None => {
                        let what = format!("`{name}` in the first value of `{}` is not known", variable.name);
                        return Err(At::new(0, what).in_source("").into());
                    }
                },
            };
            bytes.extend_from_slice(&bits.to_le_bytes()[..variable.element.min(8) as usize]);
        }
        bytes.resize(variable.bytes as usize, 0);
        Ok(bytes)
    }

    /// Frees the variables.
    pub fn unload(&self, memory: &DeviceMemory) {
        for (address, _) in self.variables.values() {
            // Freed by nobody else: the addresses are the module's own.
            let _ = memory.free(*address);
        }
    }
}
