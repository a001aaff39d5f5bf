//! Completion in shells. `kubectl aegis <TAB>` asks an executable named `kubectl_complete-aegis`, which calls this program.

use crate::args::Args;
use clap::{Command, CommandFactory};

/// The script of a shell for `kubectl-aegis` called by its own name.
pub fn script(shell: clap_complete::Shell) -> String {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "kubectl-aegis", &mut text);
    // clap_complete's script for bash calls a program with a hyphen by two names.
    String::from_utf8_lossy(&text).replace("kubectl__subcmd__aegis", "kubectl__aegis")
}

/// Lines that kubectl's plugin completion wants: candidates for the last word, then `:4`, "these, and no files", or `:0`, files too.
pub fn candidates(words: &[String]) -> String {
    let (last, before) = match words.split_last() {
        Some((last, before)) => (last.as_str(), before),
        None => ("", &[][..]),
    };
    let mut command = Args::command();
    // Without that, flags of the whole are known at the top only.
    command.build();
    let mut current: &Command = &command;
    let mut flag = None;
    for word in before {
        flag = current.get_arguments().find(|it| {
            it.get_long().is_some_and(|long| *word == format!("--{long}"))
                || it.get_short().is_some_and(|short| *word == format!("-{short}"))
        });
        if let Some(inner) = current.find_subcommand(word) {
            current = inner;
        }
    }
    let valued = flag.filter(|it| it.get_action().takes_values());
    // Of a list the last is completed, and those before it stay.
    let listed =
        valued.filter(|it| it.get_value_delimiter() == Some(',')).and_then(|_| last.rsplit_once(','));
    let stays = listed.map(|(before, _)| format!("{before},")).unwrap_or_default();
    let words: Vec<String> = match valued {
        Some(flag) => {
            let names = flag.get_possible_values();
            names.iter().map(|it| format!("{stays}{}", it.get_name())).collect()
        }
        None if last.starts_with('-') => {
            let long = current.get_arguments().filter(|it| !it.is_hide_set()).filter_map(clap::Arg::get_long);
            long.map(|it| format!("--{it}")).collect()
        }
        None => {
            let commands =
                current.get_subcommands().filter(|it| !it.is_hide_set() && it.get_name() != "help");
            let positional = current.get_positionals().flat_map(clap::Arg::get_possible_values);
            let values = positional.map(|value| value.get_name().to_owned());
            commands.map(|it| it.get_name().to_owned()).chain(values).collect()
        }
    };
    let files = valued.is_some_and(|it| {
        matches!(it.get_value_hint(), clap::ValueHint::AnyPath | clap::ValueHint::FilePath)
    });
    let fitting = words.into_iter().filter(|word| word.starts_with(last)).map(|word| word + "\n");
    fitting.collect::<String>() + if files { ":0\n" } else { ":4\n" }
}

/// The script to put beside `kubectl-aegis`, as `kubectl_complete-aegis`.
pub const PLUGIN: &str = "#!/bin/sh\nexec kubectl-aegis __complete \"$@\"\n";
