//! Options from a command line, as the tests of each bench take them.

use clap::{Args, Command};

/// The options that the arguments are; else what the parser says.
pub fn parse<O: Args>(arguments: &str) -> Result<O, String> {
    let command = O::augment_args(Command::new("bench").no_binary_name(true));
    let matches = command.try_get_matches_from(arguments.split_whitespace());
    matches.and_then(|matches| O::from_arg_matches(&matches)).map_err(|error| error.to_string())
}

/// Checks that each command line is refused in words that name what is wrong.
pub fn assert_refused<O>(parse: impl Fn(&str) -> Result<O, String>, cases: &[(&str, [&str; 2])]) {
    for (arguments, words) in cases {
        match parse(arguments) {
            Ok(_) => panic!("{arguments}: taken"),
            Err(error) => assert!(words.iter().all(|word| error.contains(word)), "{arguments}: {error}"),
        }
    }
}
