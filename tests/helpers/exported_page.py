"""The page of an export, and what a person does on it in a browser."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.page import Page


class ExportedPage(Page):
    """`index.html` of an export.

    Attributes:
        loaded: what is said when the model has been loaded, or cannot be.
    """

    def __init__(self, browser, url: str):
        self.browser, self.url = browser, url
        browser.get(url)
        self.loaded = self.wait(lambda: not (said := self.said("model")).startswith("Loading") and said)

    def said(self, place: str, role: str = "") -> str:
        return "".join(element.text for element in self.all(f"#{place}{role}"))

    def message(self, button: str, place: str) -> str:
        """Press a button and return what is said when it can be pressed again."""
        self.press(button)
        self.wait(self.all(f"#{button}")[0].is_enabled)
        return self.said(place)

    def alert(self, button: str, place: str) -> str:
        """Press a button and return what is said if it is an alert."""
        self.message(button, place)
        return self.said(place, "[role=alert]")

    def fill(self, row: int, name: str, *images: Path) -> None:
        """Give a class its name, and images beside those that it has."""
        card = self.all("#classes .gallery")[row]
        box = card.find_element("css selector", ".name")
        box.clear()
        box.send_keys(name)
        for image in images:
            card.find_element("css selector", "input[type=file]").send_keys(str(image))

    def open_folder(self, folder: Path) -> None:
        self.all("#folder")[0].send_keys(str(folder))
        self.wait(lambda: self.all("#classes img"))

    def read_names(self) -> list[str]:
        """What is in the boxes for the names of classes."""
        return [box.get_property("value") for box in self.all(".name")]

    def read_scores(self) -> list[dict[str, float]]:
        """Label to score of each new image, the likeliest first."""
        results = []
        for result in self.all(".result"):
            labels = [label.text for label in result.find_elements("css selector", ".score span")]
            scores = [float(data.get_attribute("value")) for data in result.find_elements("css selector", "data")]
            results.append(dict(zip(labels, scores, strict=True)))
        return results
