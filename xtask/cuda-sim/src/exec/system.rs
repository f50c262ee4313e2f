//! Functions of the device's runtime: `printf` and `assert`.

use super::access::{read_words, resolve, write_words};
use super::checks::Checks;
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::warp::{Warp, lanes};
use crate::code::SystemCall;
use crate::ptx::Space;

/// The longest text read from a kernel.
const MAX_TEXT: u64 = 4096;

impl<C: Checks> Cta<'_, C> {
    /// Calls a function for each lane; arguments lie in local memory.
    pub fn system(
        &mut self,
        warp: &mut Warp,
        call: SystemCall,
        result: Option<u32>,
        places: &[u32],
        active: u32,
    ) -> Result<(), Finding> {
        for lane in lanes(active) {
            let found = match call {
                SystemCall::Print => self.print(warp, places, lane).map(|count| {
                    let offset = result.and_then(|at| self.local_offset(u64::from(at), 4, lane));
                    if let Some(offset) = offset {
                        write_words(&mut warp.local, offset, 4, u64::from(count));
                        self.checks.local_written(warp.index, lane as u32, result.unwrap_or(0), 4);
                    }
                }),
                SystemCall::AssertFail => self.assertion(warp, places, lane),
            };
            found.map_err(|kind| (kind, lane as u32))?;
        }
        Ok(())
    }

    fn byte(&mut self, warp: &Warp, address: u64, bytes: u32, lane: usize) -> Result<u64, FaultKind> {
        let (space, at) = resolve(address);
        let bad = FaultKind::OutOfBounds { space, address: at, bytes, write: false };
        match space {
            Space::Local => {
                let offset = self.local_offset(at, bytes, lane).ok_or(bad)?;
                Ok(read_words(&warp.local, offset, bytes))
            }
            Space::Shared => {
                let offset = self.shared_offset(at, bytes).ok_or(bad)?;
                Ok(read_words(&self.shared, offset, bytes))
            }
            _ => {
                let found = self.allocation(at, u64::from(bytes)).ok_or(bad)?;
                Ok(found.read(at - found.base, bytes))
            }
        }
    }

    fn text(&mut self, warp: &Warp, address: u64, lane: usize) -> Result<String, FaultKind> {
        let mut text = Vec::new();
        for at in 0..MAX_TEXT {
            match self.byte(warp, address + at, 1, lane)? as u8 {
                0 => break,
                byte => text.push(byte),
            }
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn argument(&self, warp: &Warp, place: u32, lane: usize) -> u64 {
        self.local_offset(u64::from(place), 8, lane).map_or(0, |offset| read_words(&warp.local, offset, 8))
    }

    fn assertion(&mut self, warp: &Warp, places: &[u32], lane: usize) -> Result<(), FaultKind> {
        let address = |at: usize| self.argument(warp, places[at], lane);
        let (message, file, function) = (address(0), address(1), address(3));
        let offset = self.local_offset(u64::from(places[2]), 4, lane);
        let line = offset.map_or(0, |offset| read_words(&warp.local, offset, 4));
        let message = self.text(warp, message, lane)?;
        let (file, function) = (self.text(warp, file, lane)?, self.text(warp, function, lane)?);
        Err(FaultKind::Assert { message: format!("{message} at {file}:{line} in {function}") })
    }

    /// Formats as C does; arguments follow each other at their own alignment.
    fn print(&mut self, warp: &Warp, places: &[u32], lane: usize) -> Result<u32, FaultKind> {
        let format = self.argument(warp, places[0], lane);
        let mut from = self.argument(warp, places[1], lane);
        let format = self.text(warp, format, lane)?;
        let (mut out, mut count) = (String::new(), 0);
        let mut rest = format.as_str();
        while let Some(at) = rest.find('%') {
            out.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            let end = rest.find(|c: char| c.is_ascii_alphabetic() && !"hlzjt".contains(c) || c == '%');
            let Some(end) = end else { break };
            let (spec, kind) = (&rest[..end], rest.as_bytes()[end] as char);
            rest = &rest[end + 1..];
            if kind == '%' {
                out.push('%');
                continue;
            }
            let wide = spec.contains(['l', 'z', 'j', 't']) || "fFeEgGaAps".contains(kind);
            let bytes = if wide { 8 } else { 4 };
            from = from.next_multiple_of(bytes);
            let value = self.byte(warp, from, bytes as u32, lane)?;
            from += bytes;
            count += 1;
            out.push_str(&self.formatted(warp, spec, kind, value, wide, lane)?);
        }
        out.push_str(rest);
        self.launch.print(&out);
        Ok(count)
    }

    fn formatted(
        &mut self,
        warp: &Warp,
        spec: &str,
        kind: char,
        value: u64,
        wide: bool,
        lane: usize,
    ) -> Result<String, FaultKind> {
        let flags: String = spec.chars().filter(|c| !"hlzjt".contains(*c)).collect();
        let (width, precision) = flags.split_once('.').unwrap_or((&flags, ""));
        let precision = precision.parse::<usize>().ok();
        let signed = if wide { value as i64 } else { i64::from(value as u32 as i32) };
        let float = f64::from_bits(value);
        let text = match kind {
            'd' | 'i' => signed.to_string(),
            'u' => value.to_string(),
            'x' => format!("{value:x}"),
            'X' => format!("{value:X}"),
            'o' => format!("{value:o}"),
            'c' => char::from(value as u8).to_string(),
            'p' => format!("{value:#x}"),
            's' => self.text(warp, value, lane)?,
            'e' | 'E' => format!("{float:.*e}", precision.unwrap_or(6)),
            'g' | 'G' => format!("{float}"),
            _ => format!("{float:.*}", precision.unwrap_or(6)),
        };
        let left = width.contains('-');
        let zero = width.starts_with('0') && !left && kind != 's';
        let width = width.trim_start_matches(['-', '+', ' ', '#', '0']).parse::<usize>().unwrap_or(0).min(1024);
        Ok(match (left, zero) {
            (true, _) => format!("{text:<width$}"),
            (_, true) => match text.strip_prefix('-') {
                Some(digits) => format!("-{digits:0>width$}", width = width.saturating_sub(1)),
                None => format!("{text:0>width$}"),
            },
            _ => format!("{text:>width$}"),
        })
    }
}
