//! The report of a race, as a picture of the terminal: `cargo run --release -p cuda-sim --example report > race.svg`. The
//! kernel is `fixtures/nvcc/reverse.cu`, whose barrier is missing; what the simulator says goes to standard error too.

use cuda_sim::Module;
use cuda_sim::exec::{Launch, Options};
use cuda_sim::memory::DeviceMemory;

/// Pixels of a character and of a line.
const CHARACTER: [usize; 2] = [8, 20];
/// Pixels around the text.
const MARGIN: usize = 16;

/// What the simulator says of the kernel.
fn report() -> String {
    let memory = DeviceMemory::new(1 << 20);
    let module = Module::load(include_str!("../fixtures/nvcc/reverse.ptx"), &memory).unwrap_or_else(|e| panic!("{e}"));
    let data = memory.allocate(256, false).unwrap();
    memory.copy_in(data, &[0; 256]).unwrap();
    let (params, options) = (data.to_le_bytes(), Options::default());
    let kernel = &module.kernels["reverse"];
    let launch = Launch::new(kernel, ([1, 1, 1], [64, 1, 1]), 0, &params, memory.snapshot(), &options);
    format!("cuda-sim: {}", launch.run().expect_err("the kernel has a race"))
}

/// A line of the picture; the first of a report is the one that says what is wrong.
fn line(number: usize, text: &str) -> String {
    let color = match number {
        0 => "#8b949e",
        1 => "#ff7b72",
        _ => "#c9d1d9",
    };
    let (x, y) = (MARGIN, MARGIN + CHARACTER[1] * (number + 1) - 6);
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    format!("<text x=\"{x}\" y=\"{y}\" fill=\"{color}\" xml:space=\"preserve\">{text}</text>\n")
}

fn main() {
    let report = report();
    eprintln!("{report}");
    let text = format!("$ cargo run --release -p cuda-sim --example report\n{report}");
    let longest = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
    let (width, height) = (2 * MARGIN + CHARACTER[0] * longest, 2 * MARGIN + CHARACTER[1] * text.lines().count());
    let lines: String = text.lines().enumerate().map(|(number, text)| line(number, text)).collect();
    println!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"monospace\" \
         font-size=\"13\">\n<rect width=\"{width}\" height=\"{height}\" rx=\"8\" fill=\"#0d1117\"/>\n{lines}</svg>"
    );
}
