//! What a module's `.target` may hold, as ptxas 13.0 says.

/// A module's target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    capability: u32,
    /// It is for one device alone, and may hold what only that one has.
    own: bool,
}

impl Target {
    /// That of a name, `sm_90a`.
    pub fn named(name: &str) -> Option<Self> {
        let digits = name.strip_prefix("sm_")?;
        let capability = digits.trim_end_matches(['a', 'f']).parse().ok()?;
        Some(Self { capability, own: digits.ends_with('a') })
    }

    /// What an opcode needs, if the target has it not.
    pub fn lacks(self, opcode: &str) -> Option<&'static str> {
        match needs(opcode) {
            Needs::Hopper if self.capability != 90 || !self.own => Some("sm_90a"),
            Needs::Capability(90) if self.capability < 90 => Some("sm_90"),
            Needs::Capability(80) if self.capability < 80 => Some("sm_80"),
            _ => None,
        }
    }

    /// Whether arrivals of a number that is given may complete a phase.
    pub fn counts_arrivals(self) -> bool {
        self.capability >= 90
    }
}

/// What an opcode needs.
enum Needs {
    /// What every target has here.
    Nothing,
    /// A device of this capability or a later one.
    Capability(u32),
    /// A device of capability 9.0 alone.
    Hopper,
}

fn needs(opcode: &str) -> Needs {
    let mut parts = opcode.split('.');
    let base = parts.next().unwrap_or("");
    let parts: Vec<&str> = parts.collect();
    let has = |names: &[&str]| parts.iter().any(|part| names.contains(part));
    let brain = has(&["bf16", "bf16x2"]);
    let hopper = match base {
        "wgmma" | "setmaxnreg" => return Needs::Hopper,
        "elect" | "stmatrix" | "griddepcontrol" | "mapa" | "getctarank" => true,
        "cp" => has(&["bulk", "reduce"]),
        "mbarrier" => has(&["try_wait", "expect_tx", "complete_tx"]),
        "fence" => has(&["async", "tensormap::generic", "mbarrier_init"]),
        "prefetch" => has(&["tensormap"]),
        "add" | "sub" | "mul" => brain,
        "atom" | "red" => brain || has(&["v2", "v4", "v8"]),
        _ => false,
    };
    if hopper || has(&["cluster", "shared::cluster"]) {
        return Needs::Capability(90);
    }
    match base {
        "cp" | "mbarrier" | "redux" => Needs::Capability(80),
        _ => Needs::Nothing,
    }
}
