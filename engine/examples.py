"""What models that were not trained here are shown before the question: three episodes."""
FEW_SHOT = """\
Answer the question with an encyclopedia. Write one Thought and one Action at a time.
Search[title] shows the beginning of an article, or similar titles if there is none.
Lookup[keyword] shows the next sentence with that keyword in the article found last.
Finish[answer] gives the answer, as short as possible, and ends. Three examples:

Question: In which country was the composer of the opera The Glass Heron born?
Thought: I need the composer of The Glass Heron first.
Action: Search[The Glass Heron]
Observation: The Glass Heron is an opera by Ilse Varmond. It was first sung in 1911.
Thought: The composer is Ilse Varmond. Now I need her country of birth.
Action: Search[Ilse Varmond]
Observation: Ilse Varmond was a composer. She was born in Quellen, a port of Ostravia.
Thought: Quellen is in Ostravia.
Action: Finish[Ostravia]

Question: Of which illness did the engineer Corvan Hale die?
Thought: I look for Corvan Hale.
Action: Search[Corvan Hale]
Observation: Could not find Corvan Hale. Similar: [Corvan Hale (singer), Corvan Hale \
(engineer), Corvan, Hale Bridge, The Glass Heron]
Thought: There are two people of that name. I need the engineer.
Action: Search[Corvan Hale (engineer)]
Observation: Hale was an engineer. He drew bridges. He sang. He swam. He had a dog.
Thought: His death does not stand here. I look further down.
Action: Lookup[died]
Observation: (Result 1 / 1) He died of marsh fever in 1902.
Thought: He died of marsh fever.
Action: Finish[marsh fever]

Question: Do the rivers Dray and Lissow flow through the same province?
Thought: I need the province of each river. First the Dray.
Action: Search[Dray]
Observation: The Dray is a river in the province of Ombria.
Thought: The Dray is in Ombria. Now the Lissow.
Action: Search[Lissow]
Observation: The Lissow is a short river. It crosses the province of Kessel.
Thought: Ombria and Kessel are different provinces.
Action: Finish[no]

"""
