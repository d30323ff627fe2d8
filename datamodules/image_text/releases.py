"""The image–text sets of Entezari et al. 2023 (arXiv 2302.13602), as img2dataset fetches them, with their facts."""

from typing import Any

from datamodules.image_text.shards import ImageTextShards


class _Release(ImageTextShards):
    """A release: called by its own name, whatever its folder is called."""

    named_by_folder = False


class YFCC15M(_Release):
    """YFCC15M: 14,829,396 Flickr photos with English titles or descriptions, the part of YFCC100M that CLIP used.

    Source: YFCC100M (Thomee et al. 2016, arXiv 1503.01817), 99.2 million photos; the list of the part is OpenAI's
    (Radford et al. 2021): https://github.com/openai/CLIP/blob/main/data/yfcc100m.md names line, photo id and hash.
    Licence: each photo's own Creative Commons licence. Captions: title and description, URL-encoded in the release:
    decode them and put them together when you write the list.
    How to obtain: get the metadata of YFCC100M (https://multimediacommons.wordpress.com/yfcc100m-core-dataset), keep
    the lines of OpenAI's list as yfcc15m.parquet with columns url and caption, then

        img2dataset --url_list yfcc15m.parquet --input_format parquet --url_col url --caption_col caption
            --output_format webdataset --output_folder $FARSHOT_DATA/yfcc15m --image_size 256 --compute_hash sha256

    Layout: `root/00000.tar` with KEY.jpg, KEY.txt, KEY.json, and `00000.parquet` beside it. Split: none
    official; validation and test are hashed. B trains on 0.5, 2.7 and up to 15 million: `num_images`. Arguments: those
    of ImageTextShards.
    """

    name = "yfcc15m"


class LAION400M(_Release):
    """LAION-400M: about 400 million images of Common Crawl with their alt texts, chosen by CLIP's similarity.

    Source: Schuhmann et al. 2021 (arXiv 2111.02114); pairs whose CLIP ViT-B/32 similarity is 0.3 or more. Licence: the
    metadata CC BY 4.0; the images are their owners'. The lists were withdrawn in December 2023, when links to unlawful
    images were found in them. The cleaned successor of all of LAION is Re-LAION-5B (https://laion.ai/blog/relaion-5b),
    whose parts this class reads in the same way. Do not fetch old copies of the lists.
    How to obtain: the metadata of Re-LAION (Parquet files of URLs, captions and scores; ask for access), then

        img2dataset --url_list metadata --input_format parquet --url_col URL --caption_col TEXT
            --output_format webdataset --output_folder $FARSHOT_DATA/laion400m --image_size 256 --compute_hash sha256
            --save_additional_columns '["similarity","NSFW","LICENSE"]'

    (columns as LAION-400M names them; look at your files). About 10 TB for all of it. A million rows take about 200 MB
    of memory: take a part, as B does with up to 15 million, by `shards` (files hold up to 10,000 pairs each).
    Layout: `root/00000.tar` with KEY.jpg, KEY.txt, KEY.json, and `00000.parquet` beside it, which holds the saved
    columns: `score: similarity` with `curation: 0.3`, or `score: aesthetic` where a release has it (punsafe and
    pwatermark are high where an image is bad, so they are no scores for `curation`). Split: none official; validation
    and test are hashed. Arguments: those of ImageTextShards.
    """

    name = "laion400m"


class ConceptualCaptions3M(_Release):
    r"""Conceptual Captions (CC-3M): about 3.3 million web images with alt texts in which names became general words.

    Source: Sharma et al. 2018, https://ai.google.com/research/ConceptualCaptions: 3,318,333 training and 15,840
    validation URLs, of which a part is no longer there. Licence: the lists are free for any purpose, naming Google LLC
    as the source is appreciated; the images are their owners'.
    How to obtain: download the training list (a TSV of caption and URL) as cc3m.tsv, then

        sed -i '1s/^/caption\turl\n/' cc3m.tsv
        img2dataset --url_list cc3m.tsv --input_format tsv --url_col url --caption_col caption
            --output_format webdataset --output_folder $FARSHOT_DATA/cc3m --image_size 256 --compute_hash sha256

    Layout: `root/00000.tar` with KEY.jpg, KEY.txt, KEY.json, and `00000.parquet` beside it. Split: hashed; with the
    official validation list fetched to `root/val` and training to `root/train`, those. Arguments: those of
    ImageTextShards.
    """

    name = "cc3m"


class ConceptualCaptions12M(_Release):
    r"""Conceptual 12M (CC-12M): about 12.4 million web images with alt texts, filtered less than CC-3M.

    Source: Changpinyo et al. 2021 (arXiv 2102.08981), https://github.com/google-research-datasets/conceptual-12m.
    Licence: the list is free for any purpose, naming Google LLC as the source is appreciated; the images are their
    owners'. Names of persons stand as <PERSON>.
    How to obtain: about 330 GB at 256 px;

        wget https://storage.googleapis.com/conceptual_12m/cc12m.tsv
        sed -i '1s/^/url\tcaption\n/' cc12m.tsv
        img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption
            --output_format webdataset --output_folder $FARSHOT_DATA/cc12m --image_size 256 --compute_hash sha256

    Layout: `root/00000.tar` with KEY.jpg, KEY.txt, KEY.json, and `00000.parquet` beside it. Split: none official;
    validation and test are hashed. Arguments: those of ImageTextShards.
    """

    name = "cc12m"


class RedCaps(_Release):
    """RedCaps: about 12 million images from 350 subreddits with the titles that Reddit's users gave them.

    Source: Desai et al. 2021 (arXiv 2111.11431), https://redcaps.xyz. Licence: annotations CC BY 4.0; non-commercial
    research only, by the terms of Reddit's API; no tasks that identify persons; the images are their owners'.
    How to obtain: https://redcaps.xyz/download has the annotations, a JSON file a subreddit and year, whose list
    `annotations` holds url, caption (cleaned) and raw_caption. Its authors recommend their redcaps-downloader for the
    images; for this layout put url, caption and raw_caption of all files into redcaps.parquet, then

        img2dataset --url_list redcaps.parquet --input_format parquet --url_col url --caption_col caption
            --output_format webdataset --output_folder $FARSHOT_DATA/redcaps --image_size 256 --compute_hash sha256
            --save_additional_columns '["raw_caption"]'

    Layout: `root/00000.tar` with KEY.jpg, KEY.txt, KEY.json, and `00000.parquet` beside it. Captions: the cleaned one;
    `caption: [txt, "json:raw_caption"]` draws one of both. Split: none official; validation and test are hashed.
    Arguments: those of ImageTextShards.
    """

    name = "redcaps"


class WIT(_Release):
    """WIT: Wikipedia's images with their captions; 37.6 million examples, 11.5 million images, 108 languages.

    Source: Srinivasan et al. 2021 (arXiv 2103.01913), https://github.com/google-research-datasets/wit. About 5.5
    million examples are English, which is what models of English texts want. Licence: the texts CC BY-SA 3.0; each
    image has its own.
    How to obtain: the files wit_v1.train.all-0000*-of-00010.tsv.gz from that page; keep the rows with language en and
    the columns image_url and caption_* as wit.parquet, then

        img2dataset --url_list wit.parquet --input_format parquet --url_col image_url
            --caption_col caption_reference_description --output_format webdataset
            --output_folder $FARSHOT_DATA/wit --image_size 256 --compute_hash sha256
            --save_additional_columns '["caption_alt_text_description","caption_attribution_description"]'

    (Wikimedia asks for a user agent that names you: `--user_agent_token`.) Layout: `root/00000.tar` with KEY.jpg,
    KEY.txt, KEY.json, and `00000.parquet` beside it. Captions: the reference below the image; rows without one, which
    are many, are left out; `caption: [txt, "json:caption_alt_text_description"]` draws one of those there are. An image
    stands on several pages: its SHA-256 keeps it in one split. Split: hashed, or by `root/train`, `root/val` and
    `root/test` with the official lists.

    Args:
        max_bad: Share of the rows that may have no usable image or caption, 0–1: many have no reference.
        **kwargs: Arguments of ImageTextShards.
    """

    name = "wit"

    def __init__(self, *, max_bad: float = 0.9, **kwargs: Any) -> None:
        super().__init__(max_bad=max_bad, **kwargs)


class Shutterstock(_Release):
    """Shutterstock: stock photos and drawings with their descriptions, as paper B's authors crawled them; not public.

    Source: about 11.8 million pairs crawled from the search pages of https://www.shutterstock.com in 2021 (Nguyen et
    al. 2022, arXiv 2208.05516). Licence: none for training; the images are for sale, and the crawl has not been
    published as a whole. So B's results on this source cannot be repeated exactly.
    How to obtain: by a contract with Shutterstock for images and descriptions. With a list of their addresses:

        img2dataset --url_list shutterstock.parquet --input_format parquet --url_col url --caption_col caption
            --output_format webdataset --output_folder $FARSHOT_DATA/shutterstock --image_size 256 --compute_hash sha256

    Layout: `root/00000.tar` with KEY.jpg, KEY.txt, KEY.json, and `00000.parquet` beside it. Split: none official;
    validation and test are hashed. Arguments: those of ImageTextShards.
    """

    name = "shutterstock"
