//! `cuda-probe`: runs single instructions on the device that libcuda finds and writes what it answered.
//!
//! Every kernel that fails ends its process; a new one goes on behind it.

#[expect(clippy::too_many_arguments, reason = "the driver API's functions")]
mod device;
mod host;

use cuda_sim::probe::{Answer, Fixture, cases};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// A child without a new answer for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [_, "--child", from, folder] => child(from.parse().unwrap_or(0), Path::new(folder)),
        [_, "--host", group, path] => host::run(group.parse().unwrap_or(0), Path::new(path)),
        [_, "--dump", folder] => dump(Path::new(folder)),
        [_, output] => parent(&PathBuf::from(output)),
        _ => Err("usage: cuda-probe OUTPUT | cuda-probe --dump FOLDER".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the PTX and the input of every case, for other tools to read.
fn dump(folder: &Path) -> Result<(), String> {
    std::fs::create_dir_all(folder).map_err(|error| error.to_string())?;
    for (at, case) in cases(90).iter().enumerate() {
        let text = format!("// {}\n{}", case.name, case.ptx);
        std::fs::write(folder.join(format!("{at:04}.ptx")), text).map_err(|error| error.to_string())?;
        std::fs::write(folder.join(format!("{at:04}.input")), &case.input).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Runs children until every case has an answer, then puts the answers together.
fn parent(output: &Path) -> Result<(), String> {
    let folder = output.with_extension("parts");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let device = device::Device::open()?;
    let all = cases(device.capability);
    let mut fixture = Fixture { device: device.description.clone(), answers: Vec::new() };
    drop(device);
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut at = 0;
    while at < all.len() {
        let mut child = Command::new(&program);
        child.args(["--child", &at.to_string()]).arg(&folder);
        run(&mut child, &folder)?;
        let before = at;
        while at < all.len() {
            let Ok(part) = Fixture::read(&folder.join(at.to_string())) else { break };
            fixture.answers.extend(part.answers);
            at += 1;
        }
        if at == before {
            let case = &all[at];
            eprintln!("probe: no answer to {}", case.name);
            fixture.answers.push(Answer::new(&case.name, case.question(), 999, Vec::new()));
            at += 1;
        }
    }
    for group in 0..host::GROUPS.len() {
        let path = folder.join(format!("host-{group}"));
        run(Command::new(&program).args(["--host", &group.to_string()]).arg(&path), &folder)?;
        match Fixture::read(&path) {
            Ok(part) => fixture.answers.extend(part.answers),
            Err(_) => eprintln!("probe: no answer to the host's group {}", host::GROUPS[group].0),
        }
    }
    let failed = fixture.answers.iter().filter(|answer| answer.code != 0).count();
    println!("{}{} answers, {failed} of them errors", fixture.device, fixture.answers.len());
    fixture.write(output).map_err(|error| error.to_string())?;
    std::fs::remove_dir_all(&folder).map_err(|error| error.to_string())
}

/// Waits for a child as long as it makes progress.
fn run(command: &mut Command, folder: &Path) -> Result<(), String> {
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let count = || std::fs::read_dir(folder).map_or(0, |files| files.count());
    let (mut files, mut since) = (count(), Instant::now());
    loop {
        if child.try_wait().map_err(|error| error.to_string())?.is_some() {
            return Ok(());
        }
        if count() != files {
            (files, since) = (count(), Instant::now());
        }
        if since.elapsed() > PATIENCE {
            child.kill().map_err(|error| error.to_string())?;
            child.wait().map_err(|error| error.to_string())?;
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs cases from a number on until one ends the context.
fn child(from: usize, folder: &Path) -> Result<(), String> {
    let device = device::Device::open()?;
    for (at, case) in cases(device.capability).iter().enumerate().skip(from) {
        let (code, output) = device.run(case);
        let answer = Answer::new(&case.name, case.question(), code, output);
        let part = Fixture { device: String::new(), answers: vec![answer] };
        let path = folder.join(at.to_string());
        let written = folder.join(format!("{at}.new"));
        part.write(&written).map_err(|error| error.to_string())?;
        std::fs::rename(&written, &path).map_err(|error| error.to_string())?;
        if code >= 700 {
            return Ok(());
        }
    }
    Ok(())
}
