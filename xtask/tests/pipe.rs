//! Output that nobody reads on ends a command without a panic.

#[cfg(unix)]
#[test]
fn a_closed_pipe_ends_a_command_quietly() -> std::io::Result<()> {
    use std::process::{Command, Stdio};
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let mut child = command.arg("info").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(141));
    Ok(())
}
