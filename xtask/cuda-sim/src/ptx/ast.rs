//! The syntax tree.

use std::collections::BTreeMap;

/// A PTX module.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// `.version`, major and minor.
    pub version: (u32, u32),
    /// `.target`'s first name: `sm_80`.
    pub target: String,
    /// Variables at the module's top level.
    pub variables: Vec<Variable>,
    /// Entries and functions, declarations too.
    pub functions: Vec<Function>,
    /// Source files by their number (`.file`).
    pub files: BTreeMap<u32, String>,
}

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Any space, by address window.
    Generic,
    /// Device memory.
    Global,
    /// A CTA's memory.
    Shared,
    /// A thread's memory.
    Local,
    /// Device memory that kernels only read.
    Const,
    /// Parameters.
    Param,
}

/// An elementary type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Type {
    /// What the bits mean.
    pub kind: Kind,
    /// How many there are; a predicate has 1.
    pub bits: u32,
}

/// What a type's bits mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `.b`
    Bits,
    /// `.u`
    Unsigned,
    /// `.s`
    Signed,
    /// `.f16`, `.f32`, `.f64`
    Float,
    /// `.f16x2`
    FloatPair,
    /// `.bf16`
    Brain,
    /// `.bf16x2`
    BrainPair,
    /// `.tf32`
    Tensor,
    /// `.pred`
    Predicate,
}

impl Type {
    /// The type of a modifier, without its dot.
    pub fn named(name: &str) -> Option<Self> {
        let (kind, bits) = match name {
            "pred" => (Kind::Predicate, 1),
            "f16" => (Kind::Float, 16),
            "f32" => (Kind::Float, 32),
            "f64" => (Kind::Float, 64),
            "f16x2" => (Kind::FloatPair, 32),
            "bf16" => (Kind::Brain, 16),
            "bf16x2" => (Kind::BrainPair, 32),
            "tf32" => (Kind::Tensor, 32),
            "b8" => (Kind::Bits, 8),
            "b16" => (Kind::Bits, 16),
            "b32" => (Kind::Bits, 32),
            "b64" => (Kind::Bits, 64),
            "b128" => (Kind::Bits, 128),
            "u8" => (Kind::Unsigned, 8),
            "u16" => (Kind::Unsigned, 16),
            "u32" => (Kind::Unsigned, 32),
            "u64" => (Kind::Unsigned, 64),
            "s8" => (Kind::Signed, 8),
            "s16" => (Kind::Signed, 16),
            "s32" => (Kind::Signed, 32),
            "s64" => (Kind::Signed, 64),
            _ => return None,
        };
        Some(Self { kind, bits })
    }

    /// Bytes in memory.
    pub fn bytes(self) -> u32 {
        self.bits.div_ceil(8)
    }
}

/// A variable of a module or a function.
#[derive(Clone, Debug, PartialEq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Where it lives.
    pub space: Space,
    /// Alignment in bytes.
    pub align: u64,
    /// Bytes; 0 where the size comes with the launch (`.extern .shared`).
    pub bytes: u64,
    /// Bytes of an element.
    pub element: u32,
    /// First values, element by element.
    pub init: Vec<Init>,
    /// Declared `.extern`.
    pub external: bool,
}

/// A value in a variable's initialiser.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// Bits.
    Bits(u64),
    /// The address of a variable and an offset; `generic(x)` where `true`.
    Address(String, i64, bool),
}

/// A parameter of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Alignment in bytes.
    pub align: u64,
    /// A register parameter of a `.func` rather than one in memory.
    pub register: Option<Type>,
}

/// An entry or a function.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// An entry, which a host can launch.
    pub entry: bool,
    /// Its line.
    pub line: u32,
    /// Parameters.
    pub params: Vec<Parameter>,
    /// What it returns.
    pub returns: Vec<Parameter>,
    /// Its body, none where it is only declared.
    pub body: Option<Vec<Statement>>,
    /// `.maxntid`: the most threads a CTA may have.
    pub max_threads: Option<u32>,
    /// `.reqntid`: the threads that a CTA must have.
    pub required_threads: Option<[u32; 3]>,
    /// `.reqnctapercluster`, product.
    pub cluster: Option<u32>,
}

/// A line of a kernel's source (`.loc`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Number of the file.
    pub file: u32,
    /// Line in it.
    pub line: u32,
}

/// A piece of a body.
#[derive(Clone, Debug, PartialEq)]
pub enum Statement {
    /// A label.
    Label(String),
    /// Registers of one type; with a count, `name0 … name(count-1)`.
    Registers(Type, Vec<(String, Option<u32>)>),
    /// A variable.
    Variable(Variable),
    /// A label's list of targets for `brx.idx`.
    Targets(String, Vec<String>),
    /// An instruction.
    Instruction(Box<Instruction>),
    /// A scope.
    Block(Vec<Statement>),
}

/// Which lanes run an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The predicate.
    pub register: String,
    /// Lanes where it is false.
    pub negated: bool,
}

/// An instruction.
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction {
    /// Line of the PTX text.
    pub line: u32,
    /// Line of the source.
    pub location: Option<Location>,
    /// `@p`
    pub guard: Option<Guard>,
    /// Opcode with modifiers.
    pub opcode: String,
    /// Operands in order.
    pub operands: Vec<Operand>,
}

/// An address in brackets.
#[derive(Clone, Debug, PartialEq)]
pub struct Address {
    /// A register or a variable; none where it is a number.
    pub base: Option<String>,
    /// Bytes added.
    pub offset: i64,
    /// Coordinates of a tensor: `[map, {x, y}]`.
    pub coordinates: Option<Vec<Operand>>,
}

/// An operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register, a variable, a label or a function; with an offset for `name+4`.
    Name(String, i64),
    /// `!p`
    Not(String),
    /// An integer.
    Int(i64),
    /// Bits of an f32.
    F32(u32),
    /// Bits of an f64.
    F64(u64),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `[address]`
    Address(Address),
    /// `a|b`
    Pair(Box<Operand>, Box<Operand>),
    /// `(a, b)` of a call
    List(Vec<Operand>),
}
