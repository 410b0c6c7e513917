"""The look of all figures: a mode has one colour and one marker, whichever figure it is in."""

# Okabe and Ito's colours and a wine red of Tol's, which colour-blind readers tell apart; markers do it in greyscale.
COLOURS = {
    "vanilla": "#009E73",
    "fixed": "#D55E00",
    "adaptive": "#0072B2",
    "pause": "#56B4E9",
    "sps": "#882255",
    "loop": "#CC79A7",
    "ponderlm": "#E69F00",
}
MARKERS = {"vanilla": "^", "fixed": "s", "adaptive": "o", "pause": "P", "sps": "H", "loop": "D", "ponderlm": "v"}
# Of modes that have none of their own, and of further models of a mode in the same figure.
OTHER_COLOUR = "#000000"
FURTHER_MARKERS = ("X", "*", "<", ">", "p", "d", "8")
STYLE = {"svg.hashsalt": "megatron_ponder", "svg.fonttype": "none", "axes.axisbelow": True, "font.size": 9}


def look(mode: str, number: int = 0) -> dict:
    """Colour and marker of a model.

    Args:
        mode: of the model.
        number: which of the models of this mode it is in its figure, from 0.
    """
    further = FURTHER_MARKERS[(number - 1) % len(FURTHER_MARKERS)]
    marker = further if number else MARKERS.get(mode, further)
    return {"color": COLOURS.get(mode, OTHER_COLOUR), "marker": marker, "markersize": 5}


def finish(axes, x: str, y: str) -> None:
    """Give a panel the names of its axes, and the lines around and behind it.

    Args:
        axes: of Matplotlib.
        x, y: what the axes show.
    """
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def merged_labels(places: list[tuple[float, str]], character: float) -> list[tuple[float, str]]:
    """Labels of places on a line, where those that would cover each other become one, in the middle of theirs.

    Args:
        places: each with its label.
        character: width of a character, in the unit of the places.

    Returns:
        The labels that are left, from left to right.
    """
    groups = [[place] for place in sorted(places, key=lambda place: place[0])]

    def shown(group: list[tuple[float, str]]) -> tuple[float, str]:
        return sum(at for at, _ in group) / len(group), ", ".join(label for _, label in group)

    def covers(left: list, right: list) -> bool:
        (left_at, left_label), (right_at, right_label) = shown(left), shown(right)
        return right_at - left_at < character * (len(left_label) + len(right_label) + 2) / 2

    index = 0
    while index + 1 < len(groups):
        if covers(groups[index], groups[index + 1]):
            groups[index : index + 2] = [groups[index] + groups[index + 1]]
            index = max(0, index - 1)
        else:
            index += 1
    return [shown(group) for group in groups]
