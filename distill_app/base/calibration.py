"""Short dialogues on which layer importance is measured: everyday questions, lists, sums, advice."""

CALIBRATION = (
    (
        "What causes the seasons?",
        "The axis of the Earth is tilted, so each half of it leans towards the "
        "sun for one part of the year and away from it for the other.",
    ),
    (
        "Name three fruits that are red.",
        "Three red fruits are strawberries, cherries and raspberries.",
    ),
    (
        "Write a polite reminder about an unpaid bill.",
        "Dear Mr Lee, our records show that the bill of "
        "3 May is still open. Could you please settle it this week? Thank you very much.",
    ),
    (
        "Tom has 12 pears and gives away 5. How many are left?",
        "Tom starts with 12 pears. After giving away 5 he has 12 - 5 = 7 pears. The answer is 7.",
    ),
    (
        "Give me two tips for a good night's sleep.",
        "1. Go to bed at the same hour every day.\n2. Keep the bedroom dark, quiet and cool.",
    ),
    (
        "Is a whale a fish?",
        "No. A whale is a mammal: it breathes air and feeds its young with milk.",
    ),
    ("Rewrite: we was late because of the rain.", "We were late because of the rain."),
    ("What is the capital of Portugal?", "The capital of Portugal is Lisbon."),
    (
        "Explain in one sentence what a budget is.",
        "A budget is a plan of how much money comes in and how it will be spent over a certain time.",
    ),
    (
        "A box holds 6 eggs. How many eggs are in 7 boxes?",
        "Each box holds 6 eggs, so 7 boxes hold 6 * 7 = 42 eggs. The answer is 42.",
    ),
    (
        "Begin a story about a lighthouse.",
        "Every evening Marta climbed the ninety steps, lit the lamp "
        "and wrote the names of passing ships into a worn blue book.",
    ),
    (
        "How does one boil an egg?",
        "Put the egg into boiling water, wait eight minutes, then cool it under cold water and peel it.",
    ),
)
