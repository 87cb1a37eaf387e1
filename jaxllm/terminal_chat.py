"""A conversation in the terminal: `jaxllm chat`.

Reading and writing are arguments, so that a test can hold the conversation.
"""

from collections.abc import Callable
from typing import Any

from jaxllm.errors import RequestError
from jaxllm.llm import LLM
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

HELP = "/reset starts anew, /system TEXT sets the system message, /exit (or Ctrl-D) ends."

Write = Callable[[str], Any]


class TerminalChat:
    """One conversation with a model."""

    def __init__(
        self, llm: LLM, params: SamplingParams, write: Write, system: str | None = None
    ) -> None:
        """Starts with no turns.

        Args:
            llm: The model; its tokenizer must have a chat template.
            params: Of every answer.
            write: Takes pieces of text as they come.
            system: The system message, if any.
        """
        self._llm = llm
        self._params = params.clone()
        self._params.output_kind = RequestOutputKind.DELTA
        self._write = write
        self._system = system
        self.turns: list[dict[str, str]] = []

    def run(self, read: Callable[[], str]) -> None:
        """Talks until the user leaves; Ctrl-C ends an answer, and leaves where there is none.

        Args:
            read: Returns the user's next line; raises EOFError at the end.
        """
        self._write(f"{HELP}\n")
        while True:
            try:
                line = read().strip()
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                return
            if line == "/exit":
                return
            if line:
                self._obey(line)

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self.turns = []
        elif command == "/system":
            self._system = rest or None
        elif command.startswith("/"):
            self._write(f"{command} is no command. {HELP}\n")
        else:
            self.answer(line)

    def answer(self, text: str) -> None:
        """Adds the user's turn, and streams the model's; a refused turn is taken back."""
        self.turns.append({"role": "user", "content": text})
        said = ""
        try:
            system = [{"role": "system", "content": self._system}] if self._system else []
            prompt = self._llm.render([*system, *self.turns])
            for output in self._llm.stream(prompt, self._params):
                piece = output.outputs[0].text
                said += piece
                self._write(piece)
        except KeyboardInterrupt:
            self._write(" [stopped]")
        except RequestError as error:
            self.turns.pop()
            self._write(f"{error}\n")
            return
        self.turns.append({"role": "assistant", "content": said})
        self._write("\n")
