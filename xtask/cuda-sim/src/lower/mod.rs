//! Syntax tree to operations: names become rows, immediates constant rows, calls are inlined, and every modifier that
//! is not understood is an error.

mod bits;
mod bulk;
mod collective;
mod compare;
mod control;
mod convert;
mod copies;
mod float;
mod half;
mod integer;
mod layout;
mod memory;
mod moves;
mod opcode;
mod scope;
mod target;
mod tensor;
mod wgmma;

use crate::code::{Inst, Kernel, Narrowest, Op, Place, Site, Special};
use crate::error::At;
use crate::exec::regs::{AluFn, Class, Reg};
use crate::ptx::{Function, Instruction, Kind, Location, Module, Operand, Statement, Type};
use layout::align_up;
use opcode::Opcode;
use scope::{Binding, Scopes};
use std::collections::HashMap;
use std::sync::Arc;
use target::Target;

pub use layout::{LOCAL_BASE, SHARED_BASE, Symbols};

/// Functions within functions, at most.
const MAX_INLINE: usize = 16;
/// Operations of a kernel, at most.
const MAX_CODE: usize = 1 << 22;
/// Bytes of static shared memory of a kernel, at most, on every device.
const STATIC_SHARED: u32 = 48 * 1024;

/// Lowers all entries of a module. `symbols` holds the addresses of its global and constant variables.
pub fn kernels(module: &Module, symbols: &Symbols) -> Result<Vec<Kernel>, At> {
    let files = Arc::new(module.files.iter().map(|(number, name)| (*number, name.clone())).collect::<Vec<_>>());
    let entries = module.functions.iter().filter(|function| function.entry && function.body.is_some());
    entries.map(|entry| Lower::new(module, symbols, entry)?.finish(entry, &files)).collect()
}

/// The state while a kernel is lowered.
struct Lower<'m> {
    functions: HashMap<&'m str, &'m Function>,
    symbols: &'m Symbols,
    scopes: Scopes,
    code: Vec<Inst>,
    sites: Vec<Site>,
    labels: Vec<Option<u32>>,
    rows: [u32; 3],
    constants: HashMap<(Class, u64), Reg>,
    specials: HashMap<Special, Reg>,
    shared: layout::Shared,
    local_bytes: u32,
    params: Vec<(u32, u32)>,
    param_bytes: u32,
    narrowest: Narrowest,
    /// Names of the functions being inlined, and where `ret` goes.
    stack: Vec<(&'m str, Option<usize>)>,
    carry: Option<Reg>,
    /// No operation of the instruction is there yet.
    begins: bool,
    line: u32,
    location: Option<Location>,
    opcode: Arc<str>,
    opcodes: HashMap<String, Arc<str>>,
    target: Option<Target>,
}

impl<'m> Lower<'m> {
    fn new(module: &'m Module, symbols: &'m Symbols, entry: &'m Function) -> Result<Self, At> {
        let functions = module.functions.iter().fold(HashMap::new(), |mut found, function| {
            // A definition wins over its declaration.
            let old = found.insert(function.name.as_str(), function);
            if let Some(old) = old.filter(|old: &&Function| old.body.is_some()) {
                found.insert(function.name.as_str(), old);
            }
            found
        });
        let mut lower = Self {
            shared: layout::Shared::new(module, entry, &functions)?,
            functions,
            symbols,
            scopes: Scopes::default(),
            code: Vec::new(),
            sites: Vec::new(),
            labels: Vec::new(),
            rows: [0; 3],
            constants: HashMap::new(),
            specials: HashMap::new(),
            local_bytes: 0,
            params: Vec::new(),
            param_bytes: 0,
            narrowest: Narrowest { shared: 16, global: 16 },
            stack: vec![(&entry.name, None)],
            carry: None,
            begins: true,
            line: entry.line,
            location: None,
            opcode: "".into(),
            opcodes: HashMap::new(),
            target: Target::named(&module.target),
        };
        lower.entry(entry)?;
        Ok(lower)
    }

    fn entry(&mut self, entry: &'m Function) -> Result<(), At> {
        if entry.cluster.is_some_and(|ctas| ctas > 1) {
            return self.fail("clusters of more than one CTA are not supported");
        }
        self.scopes.enter(true);
        for param in &entry.params {
            let offset = align_up(self.param_bytes, param.align.clamp(1, 1 << 10) as u32);
            self.params.push((offset, param.bytes as u32));
            self.param_bytes = offset + param.bytes as u32;
            self.scopes.bind(&param.name, Binding::Param(offset));
        }
        let Some(body) = &entry.body else { return Ok(()) };
        self.block(body)?;
        self.push(Op::Exit, &[], &[], Inst::ALWAYS)?;
        self.resolve_labels()
    }

    fn finish(self, entry: &Function, files: &Arc<Vec<(u32, String)>>) -> Result<Kernel, At> {
        let declared = entry.body.iter().flatten().map(|statement| match statement {
            Statement::Registers(ty, names) if ty.kind != Kind::Predicate => {
                names.iter().map(|(_, count)| count.unwrap_or(1) * ty.bits.div_ceil(32)).sum()
            }
            _ => 0,
        });
        if self.shared.bytes() > STATIC_SHARED {
            let what = format!("{} bytes of static shared memory: {STATIC_SHARED} at most", self.shared.bytes());
            return Err(At::new(entry.line, what));
        }
        Ok(Kernel {
            name: entry.name.clone(),
            declared_registers: declared.sum(),
            code: self.code,
            sites: self.sites,
            rows: self.rows,
            constants: self.constants.into_iter().map(|((_, value), reg)| (reg, value)).collect(),
            specials: self.specials.into_iter().map(|(special, reg)| (reg, special)).collect(),
            shared_bytes: self.shared.bytes(),
            local_bytes: align_up(self.local_bytes, 16),
            params: self.params,
            param_bytes: self.param_bytes,
            max_threads: entry.max_threads,
            required_threads: entry.required_threads,
            narrowest: self.narrowest,
            files: files.clone(),
        })
    }

    fn fail<T>(&self, what: impl Into<String>) -> Result<T, At> {
        Err(At::new(self.line, what))
    }

    /// Lowers statements in the scope that is open.
    fn block(&mut self, statements: &'m [Statement]) -> Result<(), At> {
        for statement in statements {
            if let Statement::Label(name) = statement {
                let label = self.new_label();
                self.scopes.bind(name, Binding::Label(label));
            }
            if let Statement::Targets(name, targets) = statement {
                self.scopes.bind(name, Binding::Targets(targets.clone()));
            }
        }
        for statement in statements {
            match statement {
                Statement::Label(name) => {
                    if let Some(Binding::Label(label)) = self.scopes.find(name) {
                        let label = *label;
                        self.place_label(label);
                    }
                }
                Statement::Targets(..) => {}
                Statement::Registers(ty, names) => self.declare_registers(*ty, names)?,
                Statement::Variable(variable) => self.declare_variable(variable)?,
                Statement::Block(inner) => {
                    self.scopes.enter(false);
                    self.block(inner)?;
                    self.scopes.leave();
                }
                Statement::Instruction(instruction) => self.instruction(instruction)?,
            }
        }
        Ok(())
    }

    fn instruction(&mut self, i: &'m Instruction) -> Result<(), At> {
        (self.line, self.location, self.begins) = (i.line, i.location, true);
        if self.code.len() > MAX_CODE {
            return self.fail("the kernel is too large");
        }
        if !self.opcodes.contains_key(&i.opcode) {
            if let Some(needed) = self.target.and_then(|target| target.lacks(&i.opcode)) {
                return self.fail(format!("`{}` needs .target {needed}", i.opcode));
            }
            self.opcodes.insert(i.opcode.clone(), i.opcode.as_str().into());
        }
        self.opcode = self.opcodes[&i.opcode].clone();
        let mut opcode = Opcode::new(&i.opcode);
        let guard = match &i.guard {
            None => Inst::ALWAYS,
            Some(guard) => self.predicate(&guard.register, guard.negated)?,
        };
        if opcode.base == "call" && guard != Inst::ALWAYS {
            let skip = self.new_label();
            self.push(Op::Branch(skip as u32), &[], &[], guard ^ 1)?;
            self.dispatch(&mut opcode, i)?;
            self.place_label(skip);
            return Ok(());
        }
        let first = self.code.len();
        self.dispatch(&mut opcode, i)?;
        if let [left, ..] = opcode.rest() {
            return self.fail(format!("modifier `.{left}` of `{}` is not supported", i.opcode));
        }
        if guard != Inst::ALWAYS {
            for inst in &mut self.code[first..] {
                if inst.guard != Inst::ALWAYS {
                    return Err(At::new(i.line, "a guard on an instruction that needs one of its own"));
                }
                inst.guard = guard;
            }
        }
        Ok(())
    }

    fn dispatch(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        match o.base {
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "min" | "max" | "abs" | "neg" => self.arithmetic(o, i),
            "addc" | "subc" | "madc" | "rem" | "mul24" | "mad24" | "sad" | "dp4a" | "dp2a" => self.integer(o, i),
            "popc" | "clz" | "bfind" | "brev" | "bfe" | "bfi" | "bmsk" | "and" | "or" | "xor" | "not" | "cnot"
            | "lop3" | "shl" | "shr" | "shf" | "prmt" | "szext" => self.bits(o, i),
            "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" | "copysign" | "testp" => {
                self.function_of_float(o, i)
            }
            "set" | "setp" | "selp" | "slct" => self.compare(o, i),
            "mov" | "cvta" | "isspacep" | "mapa" | "getctarank" => self.moves(o, i),
            "cvt" => self.convert(o, i),
            "ld" | "ldu" | "st" | "atom" | "red" | "prefetch" | "prefetchu" | "applypriority" | "discard" => {
                self.memory(o, i)
            }
            "bra" | "brx" | "call" | "ret" | "exit" | "trap" | "brkpt" | "nanosleep" | "pmevent" | "setmaxnreg" => {
                self.control(o, i)
            }
            "shfl" | "vote" | "match" | "redux" | "activemask" | "elect" | "bar" | "barrier" | "membar" | "fence"
            | "griddepcontrol" => self.collective(o, i),
            "ldmatrix" | "stmatrix" | "mma" => self.tensor(o, i),
            "wgmma" => self.wgmma(o, i),
            "cp" | "mbarrier" => self.copies(o, i),
            _ => self.fail(format!("`{}` is not supported", i.opcode)),
        }
    }

    /// Appends an operation.
    fn push(&mut self, op: Op, reads: &[Reg], writes: &[Reg], guard: u32) -> Result<(), At> {
        self.code.push(Inst { guard, op });
        self.sites.push(Site {
            line: self.line,
            first: std::mem::take(&mut self.begins),
            opcode: self.opcode.clone(),
            location: self.location,
            reads: reads.into(),
            writes: writes.into(),
        });
        Ok(())
    }

    /// Appends an operation for all lanes that run.
    fn emit(&mut self, op: Op, reads: &[Reg], writes: &[Reg]) -> Result<(), At> {
        self.push(op, reads, writes, Inst::ALWAYS)
    }

    /// Appends a lane function.
    fn alu(&mut self, f: AluFn, dst: Reg, sources: &[Reg]) -> Result<(), At> {
        let mut rows = [dst.row; 6];
        for (row, source) in rows[1..].iter_mut().zip(sources) {
            *row = source.row;
        }
        self.emit(Op::Alu { f, rows }, sources, &[dst])
    }

    fn new_label(&mut self) -> usize {
        self.labels.push(None);
        self.labels.len() - 1
    }

    fn place_label(&mut self, label: usize) {
        self.labels[label] = Some(self.code.len() as u32);
    }

    /// Labels were numbers of labels; they become numbers of operations.
    fn resolve_labels(&mut self) -> Result<(), At> {
        let place = |label: u32, line| {
            self.labels.get(label as usize).copied().flatten().ok_or_else(|| At::new(line, "a label without a place"))
        };
        for (inst, site) in self.code.iter_mut().zip(&self.sites) {
            match &mut inst.op {
                Op::Branch(target) => *target = place(*target, site.line)?,
                Op::BranchIndex(_, targets) => {
                    for target in targets.iter_mut() {
                        *target = place(*target, site.line)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn new_reg(&mut self, class: Class) -> Reg {
        let row = &mut self.rows[class as usize];
        *row += 1;
        Reg { class, row: *row - 1 }
    }

    /// The row of a constant.
    fn constant(&mut self, class: Class, value: u64) -> Reg {
        let value = match class {
            Class::Word => value & 0xffff_ffff,
            Class::Double => value,
            Class::Predicate => value & 1,
        };
        if let Some(reg) = self.constants.get(&(class, value)) {
            return *reg;
        }
        let reg = self.new_reg(class);
        self.constants.insert((class, value), reg);
        reg
    }

    /// A number of the operands.
    fn arity(&self, i: &Instruction, counts: std::ops::RangeInclusive<usize>) -> Result<(), At> {
        if counts.contains(&i.operands.len()) {
            return Ok(());
        }
        self.fail(format!("`{}` with {} operands", i.opcode, i.operands.len()))
    }

    /// The predicate behind a guard or a predicate operand: `row << 1 | negated`.
    fn predicate(&mut self, name: &str, negated: bool) -> Result<u32, At> {
        match self.scopes.find(name) {
            Some(Binding::Register(reg, _)) if reg.class == Class::Predicate => Ok(reg.row << 1 | u32::from(negated)),
            _ => self.fail(format!("`{name}` is no predicate")),
        }
    }

    /// A predicate operand: `p`, `!p`, or a constant.
    fn predicate_operand(&mut self, operand: &Operand) -> Result<u32, At> {
        match operand {
            Operand::Name(name, 0) => self.predicate(name, false),
            Operand::Not(name) => self.predicate(name, true),
            Operand::Int(value) => Ok(self.constant(Class::Predicate, u64::from(*value != 0)).row << 1),
            _ => self.fail("expected a predicate"),
        }
    }

    /// The register that a predicate operand names, negated into a new one where needed.
    fn predicate_reg(&mut self, operand: &Operand) -> Result<Reg, At> {
        let encoded = self.predicate_operand(operand)?;
        let reg = Reg { class: Class::Predicate, row: encoded >> 1 };
        if encoded & 1 == 0 {
            return Ok(reg);
        }
        let not = self.new_reg(Class::Predicate);
        self.alu(crate::exec::regs::alu!(P; P p => !p), not, &[reg])?;
        Ok(not)
    }

    /// A source of a type; registers must have its width.
    fn source(&mut self, operand: &Operand, ty: Type) -> Result<Reg, At> {
        let (reg, bits) = self.any_source(operand, ty)?;
        if bits != 0 && bits != ty.bits && !(ty.bits == 8 && bits <= 32) {
            return self.fail(format!("a register of {bits} bits where {} are needed", ty.bits));
        }
        Ok(reg)
    }

    /// A source and its declared width, 0 for constants.
    fn any_source(&mut self, operand: &Operand, ty: Type) -> Result<(Reg, u32), At> {
        let class = class_of(ty);
        match operand {
            Operand::Int(value) => {
                let bits = match ty {
                    Type { kind: Kind::Float, bits: 32 } => u64::from((*value as f32).to_bits()),
                    Type { kind: Kind::Float, bits: 64 } => (*value as f64).to_bits(),
                    _ if ty.bits < 32 => *value as u64 & ((1 << ty.bits) - 1),
                    _ => *value as u64,
                };
                Ok((self.constant(class, bits), 0))
            }
            Operand::F32(bits) if ty.bits == 32 => Ok((self.constant(class, u64::from(*bits)), 0)),
            Operand::F32(bits) if ty.bits == 64 && ty.kind == Kind::Float => {
                Ok((self.constant(class, f64::from(f32::from_bits(*bits)).to_bits()), 0))
            }
            Operand::F64(bits) if ty.bits == 64 => Ok((self.constant(class, *bits), 0)),
            Operand::F64(bits) if ty.bits == 32 && ty.kind != Kind::FloatPair && ty.kind != Kind::BrainPair => {
                Ok((self.constant(class, u64::from((f64::from_bits(*bits) as f32).to_bits())), 0))
            }
            Operand::Name(name, offset) => self.named_source(name, *offset, ty),
            Operand::Not(_) if ty.kind == Kind::Predicate => Ok((self.predicate_reg(operand)?, 1)),
            _ => self.fail("an operand that this instruction does not take"),
        }
    }

    fn named_source(&mut self, name: &str, offset: i64, ty: Type) -> Result<(Reg, u32), At> {
        if let Some(Binding::Register(reg, bits)) = self.scopes.find(name) {
            let (reg, bits) = (*reg, *bits);
            if offset != 0 {
                return self.fail("an offset on a register");
            }
            if (reg.class == Class::Predicate) != (ty.kind == Kind::Predicate) {
                return self.fail(format!("`{name}` is of another kind than the instruction"));
            }
            return Ok((reg, bits));
        }
        if let Some((special, bits)) = scope::special(name) {
            if let Some(reg) = self.specials.get(&special) {
                return Ok((*reg, bits));
            }
            let reg = self.new_reg(if bits == 64 { Class::Double } else { Class::Word });
            self.specials.insert(special, reg);
            return Ok((reg, bits));
        }
        match self.variable_address(name)? {
            Some(address) if ty.bits >= 32 => Ok((self.constant(class_of(ty), address.wrapping_add(offset as u64)), 0)),
            _ => self.fail(format!("`{name}` is not known here")),
        }
    }

    /// A destination of a type; `_` is a row that nobody reads.
    fn dst(&mut self, operand: &Operand, ty: Type) -> Result<Reg, At> {
        let (reg, bits) = self.any_dst(operand, class_of(ty))?;
        if bits != 0 && bits != ty.bits {
            return self.fail(format!("a register of {bits} bits where {} are needed", ty.bits));
        }
        Ok(reg)
    }

    /// A destination and its declared width.
    fn any_dst(&mut self, operand: &Operand, class: Class) -> Result<(Reg, u32), At> {
        match operand {
            Operand::Name(name, 0) if name == "_" => Ok((self.new_reg(class), 0)),
            Operand::Name(name, 0) => match self.scopes.find(name) {
                Some(Binding::Register(reg, bits)) => {
                    if (reg.class == Class::Predicate) != (class == Class::Predicate) {
                        return self.fail(format!("`{name}` is of another kind than the instruction"));
                    }
                    Ok((*reg, *bits))
                }
                _ => self.fail(format!("`{name}` is no register")),
            },
            _ => self.fail("expected a register to write to"),
        }
    }

    /// An address in brackets.
    fn place(&mut self, operand: &Operand) -> Result<Place, At> {
        let Operand::Address(address) = operand else { return self.fail("expected an address in brackets") };
        if address.coordinates.is_some() {
            return self.fail("coordinates where an address is needed");
        }
        self.address_place(address.base.as_deref(), address.offset)
    }

    fn address_place(&mut self, base: Option<&str>, offset: i64) -> Result<Place, At> {
        let Some(name) = base else { return Ok(Place { base: None, offset }) };
        if let Some(Binding::Register(reg, bits)) = self.scopes.find(name) {
            if reg.class == Class::Predicate || *bits < 32 {
                return self.fail(format!("`{name}` holds no address"));
            }
            return Ok(Place { base: Some(*reg), offset });
        }
        match self.variable_address(name)? {
            Some(address) => Ok(Place { base: None, offset: (address as i64).wrapping_add(offset) }),
            None => self.fail(format!("`{name}` is not known here")),
        }
    }

    /// Registers of a place.
    fn place_reads(place: &Place, more: &[Reg]) -> Vec<Reg> {
        place.base.into_iter().chain(more.iter().copied()).collect()
    }
}

/// The file that registers of a type live in.
fn class_of(ty: Type) -> Class {
    match ty {
        Type { kind: Kind::Predicate, .. } => Class::Predicate,
        Type { bits: 64, .. } => Class::Double,
        _ => Class::Word,
    }
}
