//! The figures as tables and CSV.

use super::columns::{self, field};
use super::fit::{self, Point};
use super::turns::Times;
use super::work::{Pairs, Pass, flop, row_bytes};
use anyhow::Result;
use comfy_table::Table;
use nsa_core::NsaConfig;
use std::path::Path;

/// What is timed against what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Our sparse attention.
    Nsa,
    /// Our full attention.
    Dense,
    /// A peer's full attention.
    PeerDense(String),
    /// A peer's sparse attention: its work is its own.
    PeerSparse(String),
}

impl Who {
    /// As tables and plots name it.
    pub fn name(&self) -> &str {
        match self {
            Self::Nsa => "nsa",
            Self::Dense => "dense",
            Self::PeerDense(name) | Self::PeerSparse(name) => name,
        }
    }
}

/// One contender's figures for one pass at one length.
#[derive(Clone, Debug)]
pub struct Row {
    /// Length of the sequence or the context.
    pub tokens: usize,
    /// Name of the element type.
    pub dtype: &'static str,
    /// Bytes of an element.
    pub element_bytes: usize,
    /// What was timed.
    pub pass: Pass,
    /// Whose.
    pub who: Who,
    /// None if it did not run.
    pub times: Option<Times>,
    /// How it ran, or why it did not.
    pub note: String,
}

/// All rows of a run.
#[derive(Debug)]
pub struct Report<'a> {
    /// The shapes.
    pub config: &'a NsaConfig,
    /// Sequences of a decoding step.
    pub batch: usize,
    /// In the order of the table.
    pub rows: Vec<Row>,
}

/// What follows from a row's time.
struct Figures {
    flop: Option<f64>,
    bytes: Option<f64>,
    /// Times as fast as our full attention.
    over_dense: Option<f64>,
    /// Times as fast as a peer's full attention.
    over_peer: Option<f64>,
    /// The first of these where both run at the same rate.
    limit: f64,
}

impl Report<'_> {
    /// Sequences of a pass.
    fn batch(&self, pass: Pass) -> usize {
        if pass == Pass::Decode { self.batch } else { 1 }
    }

    /// A pass, with its sequences if they are several.
    pub fn pass_name(&self, pass: Pass) -> String {
        match self.batch(pass) {
            1 => pass.name().to_owned(),
            batch => format!("{} of {batch}", pass.name()),
        }
    }

    fn figures(&self, row: &Row) -> Figures {
        let pairs = Pairs::of(self.config, row.pass, row.tokens);
        let own = match row.who {
            Who::Nsa => Some(pairs.nsa),
            Who::Dense | Who::PeerDense(_) => Some(pairs.dense),
            Who::PeerSparse(_) => None,
        };
        let own = own.map(|pairs| pairs * self.batch(row.pass) as u64);
        let decode = own.filter(|_| row.pass == Pass::Decode);
        let faster = |is: fn(&Who) -> bool| {
            let same = |r: &&Row| r.tokens == row.tokens && r.dtype == row.dtype && r.pass == row.pass && is(&r.who);
            let theirs = self.rows.iter().find(same).filter(|r| r.who != row.who)?.times?;
            Some(theirs.median_s / row.times?.median_s)
        };
        Figures {
            flop: own.map(|pairs| flop(self.config, row.pass, pairs)),
            bytes: decode.map(|rows| row_bytes(self.config, rows, row.element_bytes)),
            over_dense: faster(|who| *who == Who::Dense),
            over_peer: faster(|who| matches!(who, Who::PeerDense(_))),
            limit: pairs.limit(),
        }
    }

    /// A row for every contender: time, rate, how much faster than full attention, and how much faster NSA can be.
    pub fn table(&self) -> Table {
        let names = ["tokens", "dtype", "pass", "who"];
        let header = [&names[..], &columns::TIME_CELLS, &["rate", "× dense", "× peer", "limit"]].concat();
        let mut table = columns::table(&header, names.len());
        for row in &self.rows {
            let figures = self.figures(row);
            let ratio = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2}"));
            let limit = (row.who == Who::Nsa).then_some(figures.limit);
            let pass = self.pass_name(row.pass);
            let names = [&row.tokens.to_string(), row.dtype, &pass, row.who.name()].map(str::to_owned);
            let ratios = [ratio(figures.over_dense), ratio(figures.over_peer), ratio(limit)];
            let times = columns::time_cells(row.times);
            table.add_row(names.into_iter().chain(times).chain([rate(row, &figures)]).chain(ratios));
        }
        table
    }

    /// How contenders ran, and why they did not: lines behind the table, one for all lengths of which the same holds.
    pub fn notes(&self) -> Vec<String> {
        let noted = || self.rows.iter().filter(|row| !row.note.is_empty());
        let line = |row: &Row| {
            let mark = if row.times.is_none() { "- " } else { "" };
            (format!("{mark}{} {} {}", row.who.name(), self.pass_name(row.pass), row.dtype), row.note.clone())
        };
        let tokens = |of: &(String, String)| {
            noted().filter(|row| line(row) == *of).map(|row| row.tokens.to_string()).collect::<Vec<_>>().join(", ")
        };
        distinct(noted().map(line)).iter().map(|of| format!("{} at {}: {}", of.0, tokens(of), of.1)).collect()
    }

    /// Exponents of the fitted power laws, and from which length on NSA is faster; empty without a second length.
    pub fn laws(&self) -> Option<Table> {
        let header = ["dtype", "pass", "who", "time ~ tokens^", "work ~ tokens^", "NSA is faster from"];
        let mut table = columns::table(&header, 3);
        for dtype in self.dtypes() {
            for passes in [&[Pass::Forward][..], &[Pass::Backward], &[Pass::Forward, Pass::Backward], &[Pass::Decode]] {
                for who in self.who() {
                    let points = self.points(dtype, passes, &who);
                    let Some(time) = fit::exponent(&points) else { continue };
                    let work = fit::exponent(&self.work(dtype, passes, &who));
                    let nsa = self.points(dtype, passes, &Who::Nsa);
                    let even = (who != Who::Nsa).then(|| fit::break_even(&nsa, &points)).flatten();
                    table.add_row([
                        dtype.to_owned(),
                        passes.iter().map(|&pass| self.pass_name(pass)).collect::<Vec<_>>().join(" + "),
                        who.name().to_owned(),
                        format!("{time:.2}"),
                        work.map_or(String::new(), |work| format!("{work:.2}")),
                        even.map_or(String::new(), |even| even.to_string()),
                    ]);
                }
            }
        }
        (!table.is_empty()).then_some(table)
    }

    /// Names of the element types, in order.
    pub fn dtypes(&self) -> Vec<&'static str> {
        distinct(self.rows.iter().map(|row| row.dtype))
    }

    /// The contenders, in order.
    pub fn who(&self) -> Vec<Who> {
        distinct(self.rows.iter().map(|row| row.who.clone()))
    }

    /// Lengths and medians of the sum of passes, where all of them ran.
    pub fn points(&self, dtype: &str, passes: &[Pass], who: &Who) -> Vec<Point> {
        self.sums(dtype, passes, who, |row| Some(row.times?.median_s))
    }

    fn work(&self, dtype: &str, passes: &[Pass], who: &Who) -> Vec<Point> {
        self.sums(dtype, passes, who, |row| row.times.and_then(|_| self.figures(row).flop))
    }

    /// Seconds that NSA's work takes at the rate of our full attention, at its longest length for those beyond.
    pub fn limit_points(&self, dtype: &str, pass: Pass) -> Vec<Point> {
        let rows = |who: Who| self.rows.iter().filter(move |r| r.dtype == dtype && r.pass == pass && r.who == who);
        let per_pair: Vec<Point> = rows(Who::Dense)
            .filter_map(|row| {
                let pairs = Pairs::of(self.config, pass, row.tokens).dense;
                Some((row.tokens as f64, row.times?.median_s / pairs as f64))
            })
            .collect();
        let limit = |row: &Row| {
            let tokens = row.tokens as f64;
            let (_, each) =
                per_pair.iter().find(|p| p.0 == tokens).or_else(|| per_pair.last().filter(|p| p.0 < tokens))?;
            Some((tokens, each * Pairs::of(self.config, pass, row.tokens).nsa as f64))
        };
        rows(Who::Nsa).filter_map(limit).collect()
    }

    fn sums(&self, dtype: &str, passes: &[Pass], who: &Who, value: impl Fn(&Row) -> Option<f64>) -> Vec<Point> {
        let of = |tokens: usize, pass: Pass| {
            let same = |r: &&Row| r.tokens == tokens && r.dtype == dtype && r.pass == pass && r.who == *who;
            self.rows.iter().find(same).and_then(&value)
        };
        distinct(self.rows.iter().map(|row| row.tokens))
            .into_iter()
            .filter_map(|tokens| {
                Some((tokens as f64, passes.iter().map(|&pass| of(tokens, pass)).sum::<Option<f64>>()?))
            })
            .collect()
    }

    /// Everything, one line a row.
    pub fn csv(&self) -> Result<String> {
        let names = ["tokens", "dtype", "pass", "batch", "who"];
        let rates = ["flop", "gflop_per_s", "bytes", "gb_per_s"];
        let ratios = ["speedup_over_dense", "speedup_over_peer", "work_limit", "note"];
        let fields = |row: &Row| {
            let figures = self.figures(row);
            let rate = |amount: Option<f64>| field(amount.zip(row.times).map(|(a, times)| a / times.median_s / 1e9));
            let (tokens, batch) = (row.tokens.to_string(), self.batch(row.pass).to_string());
            let names = [&tokens, row.dtype, row.pass.name(), &batch, row.who.name()].map(str::to_owned);
            let rates = [field(figures.flop), rate(figures.flop), field(figures.bytes), rate(figures.bytes)];
            let ratios = [figures.over_dense, figures.over_peer, Some(figures.limit)].map(field);
            let times = columns::time_fields(row.times);
            [&names[..], &times, &rates, &ratios, std::slice::from_ref(&row.note)].concat()
        };
        let header = [&names[..], &columns::TIME_FIELDS, &rates, &ratios].concat();
        columns::csv(&header, self.rows.iter().map(fields))
    }

    /// Prints tables and notes; writes `bench.csv` and a plot for each dtype into `out`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, out: &Path) -> Result<()> {
        println!("{}", self.table());
        for note in self.notes() {
            println!("{note}");
        }
        if let Some(laws) = self.laws() {
            println!("{laws}");
        }
        columns::write(out, "bench.csv", &self.csv()?)?;
        for dtype in self.dtypes() {
            columns::write(out, &format!("bench-{dtype}.svg"), &super::plot::svg(self, dtype)?)?;
        }
        Ok(())
    }
}

/// Decoding moves bytes, the rest computes.
fn rate(row: &Row, figures: &Figures) -> String {
    let Some(times) = row.times else { return "-".to_owned() };
    match (figures.bytes, figures.flop) {
        (Some(bytes), _) => format!("{:.1} GB/s", bytes / times.median_s / 1e9),
        (None, Some(flop)) => format!("{:.1} GFLOP/s", flop / times.median_s / 1e9),
        (None, None) => String::new(),
    }
}

fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CompressKind;

    fn row(tokens: usize, pass: Pass, who: Who, seconds: Option<f64>) -> Row {
        let times = seconds.map(|s| Times { median_s: s, min_s: s / 2.0, max_s: s * 2.0, samples: 3 });
        let note = if times.is_none() { "beyond, \"the\" limit".to_owned() } else { String::new() };
        Row { tokens, dtype: "bf16", element_bytes: 2, pass, who, times, note }
    }

    fn report(config: &NsaConfig) -> Report<'_> {
        let peer = || Who::PeerDense("PyTorch 2".to_owned());
        let mut rows = Vec::new();
        for (tokens, factor) in [(4096, 1.0), (8192, 2.0)] {
            rows.push(row(tokens, Pass::Forward, Who::Nsa, Some(factor)));
            rows.push(row(tokens, Pass::Forward, Who::Dense, (tokens == 4096).then_some(0.5)));
            rows.push(row(tokens, Pass::Forward, peer(), Some(0.75 * factor * factor)));
            rows.push(row(tokens, Pass::Decode, Who::Nsa, Some(1e-3)));
            rows.push(row(tokens, Pass::Decode, Who::PeerSparse("LR".to_owned()), Some(4e-3)));
        }
        Report { config, batch: 1, rows }
    }

    fn config() -> NsaConfig {
        NsaConfig::builder(16, 1, 128, 128).compress_kind(CompressKind::Mean).build().expect("valid")
    }

    #[test]
    fn figures_are_ratios_of_the_same_length_and_pass() {
        let config = config();
        let report = report(&config);
        let figures = report.figures(&report.rows[0]);
        assert_eq!((figures.over_dense, figures.over_peer), (Some(0.5), Some(0.75)));
        assert_eq!(figures.bytes, None);
        let dense = report.figures(&report.rows[1]);
        assert_eq!((dense.over_dense, dense.over_peer), (None, Some(1.5)));
        // 4096 · 4097 / 2 pairs in 16 heads of 512 FLOP.
        assert_eq!(dense.flop, Some(4096.0 * 4097.0 / 2.0 * 16.0 * 512.0));
        let decode = report.figures(&report.rows[8]);
        // 511 compressed rows, 1024 selected, 512 in the window; keys and values of 128 in bf16.
        assert_eq!(decode.bytes, Some(2047.0 * 512.0));
        assert!((decode.limit - 8192.0 / 2047.0).abs() < 1e-12);
        let sparse = report.figures(&report.rows[9]);
        assert!(sparse.flop.is_none() && sparse.bytes.is_none() && sparse.over_dense.is_none());
    }

    #[test]
    fn a_step_of_several_sequences_says_so_and_counts_all_of_them() {
        let config = config();
        let (one, three) = (report(&config), Report { batch: 3, ..report(&config) });
        for (row, times) in [(0, 1.0), (3, 3.0)] {
            let [one, three] = [&one, &three].map(|report| report.figures(&report.rows[row]));
            assert_eq!(three.flop, one.flop.map(|flop| times * flop));
            assert_eq!(three.bytes, one.bytes.map(|bytes| times * bytes));
            assert_eq!((three.over_dense, three.limit), (one.over_dense, one.limit));
        }
        let (table, csv) = (three.table().to_string(), three.csv().expect("text"));
        assert!(table.contains("decode of 3") && !table.contains("forward of"), "{table}");
        assert!(three.laws().expect("two lengths").to_string().contains("decode of 3"));
        assert!(csv.contains("\n4096,bf16,forward,1,nsa,") && csv.contains("\n4096,bf16,decode,3,nsa,"), "{csv}");
        let plot = super::super::plot::svg(&three, "bf16").expect("it is drawn");
        assert!(plot.contains("one decoding step of 3 sequences, bf16"), "{plot}");
    }

    #[test]
    fn the_table_shows_what_did_not_run() {
        let config = config();
        let report = report(&config);
        let table = report.table().to_string();
        let missing = table.lines().find(|line| line.contains("8192") && line.contains("dense")).expect("a row");
        assert_eq!(missing.matches(" - ").count(), 5, "{missing}");
        assert_eq!(report.notes(), ["- dense forward bf16 at 8192: beyond, \"the\" limit"]);
        let first = table.lines().find(|line| line.contains("nsa")).expect("a row");
        assert!(first.contains("1.000 s") && first.contains("0.50") && first.contains("0.75"), "{first}");
    }

    #[test]
    fn laws_need_two_lengths() {
        let config = config();
        let mut report = report(&config);
        let laws = report.laws().expect("two lengths").to_string();
        let line =
            |who: &str| laws.lines().find(|line| line.contains(who) && line.contains("forward")).map(str::to_owned);
        assert!(line("nsa").expect("a law").contains("1.00"), "{laws}");
        let peer = line("PyTorch").expect("a law");
        assert!(peer.contains("2.00") && peer.contains("5461"), "{peer}");
        assert_eq!(line("dense"), None, "full attention has one length");
        report.rows.retain(|row| row.tokens == 4096);
        assert!(report.laws().is_none());
    }

    #[test]
    fn the_limit_goes_on_at_the_rate_of_the_longest_full_attention() {
        let config = config();
        let report = report(&config);
        let points = report.limit_points("bf16", Pass::Forward);
        let of = |tokens| Pairs::of(&config, Pass::Forward, tokens);
        let each = 0.5 / of(4096).dense as f64;
        assert_eq!(points, [(4096.0, each * of(4096).nsa as f64), (8192.0, each * of(8192).nsa as f64)]);
        assert!(report.limit_points("f32", Pass::Forward).is_empty());
    }

    #[test]
    fn csv_has_every_row_and_quotes() {
        let config = config();
        let csv = report(&config).csv().expect("text");
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines.len(), 11);
        let columns = lines[0].split(',').count();
        assert!(
            lines
                .iter()
                .all(|line| line.split(',').count() == columns || line.contains("\"beyond, \"\"the\"\" limit\""))
        );
        assert!(lines[1].starts_with("4096,bf16,forward,1,nsa,3,1.000000e0,5.000000e-1,2.000000e0,"), "{}", lines[1]);
        assert!(lines[7].starts_with("8192,bf16,forward,1,dense,0,,,,"), "{}", lines[7]);
    }
}
