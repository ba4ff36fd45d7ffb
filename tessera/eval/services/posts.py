"""Short public messages: tweets, their comments, retweets, and whom one follows.

Tweets and comments are kept by the tweet's id as a text, which is how the items give them.
"""

from __future__ import annotations

from typing import Any

from tessera.eval.services.base import Refused, Service, offered


class Posts(Service):
    defaults = {
        "username": "john",
        "password": "john123",
        "authenticated": False,
        "tweets": {},
        "comments": {},
        "retweets": {},
        "following_list": ["alice", "bob"],
        "tweet_counter": 0,
    }

    def _user(self) -> str:
        if not self.data["authenticated"]:
            raise Refused("nobody is authenticated")
        return self.data["username"]

    def _tweet(self, tweet_id: int) -> dict[str, Any]:
        if str(tweet_id) not in self.data["tweets"]:
            raise Refused(f"there is no tweet {tweet_id}")
        return self.data["tweets"][str(tweet_id)]

    @offered
    def authenticate_twitter(self, username: str, password: str) -> Any:
        given = (username, password)
        right = given == (self.data["username"], self.data["password"])
        if right:
            self.data["authenticated"] = True
        return {"authentication_status": right}

    @offered
    def posting_get_login_status(self) -> Any:
        return {"login_status": bool(self.data["authenticated"])}

    @offered
    def post_tweet(
        self, content: str, tags: list[str] | None = None, mentions: list[str] | None = None
    ) -> Any:
        number, user = self.data["tweet_counter"], self._user()
        tweet = {
            "id": number,
            "username": user,
            "content": content,
            "tags": tags or [],
            "mentions": mentions or [],
        }
        self.data["tweets"][str(number)] = tweet
        self.data["tweet_counter"] += 1
        return tweet

    @offered
    def retweet(self, tweet_id: int) -> Any:
        user = self._user()
        self._tweet(tweet_id)
        kept = self.data["retweets"].setdefault(user, [])
        if tweet_id in kept:
            return {"retweet_status": "it was retweeted before"}
        kept.append(tweet_id)
        return {"retweet_status": "retweeted"}

    @offered
    def comment(self, tweet_id: int, comment_content: str) -> Any:
        user = self._user()
        self._tweet(tweet_id)
        row = {"username": user, "content": comment_content}
        self.data["comments"].setdefault(str(tweet_id), []).append(row)
        return {"comment_status": "commented"}

    @offered
    def mention(self, tweet_id: int, mentioned_usernames: list[str]) -> Any:
        self._user()
        self._tweet(tweet_id)["mentions"] += mentioned_usernames
        return {"mention_status": "mentioned"}

    @offered
    def follow_user(self, username_to_follow: str) -> Any:
        self._user()
        if username_to_follow in self.data["following_list"]:
            return {"follow_status": False}
        self.data["following_list"].append(username_to_follow)
        return {"follow_status": True}

    @offered
    def unfollow_user(self, username_to_unfollow: str) -> Any:
        self._user()
        if username_to_unfollow not in self.data["following_list"]:
            return {"unfollow_status": False}
        self.data["following_list"].remove(username_to_unfollow)
        return {"unfollow_status": True}

    @offered
    def list_all_following(self) -> Any:
        self._user()
        return {"following_list": self.data["following_list"]}

    @offered
    def get_tweet(self, tweet_id: int) -> Any:
        return self._tweet(tweet_id)

    @offered
    def get_tweet_comments(self, tweet_id: int) -> Any:
        self._tweet(tweet_id)
        return {"comments": self.data["comments"].get(str(tweet_id), [])}

    @offered
    def get_user_tweets(self, username: str) -> Any:
        tweets = self.data["tweets"].values()
        return {"user_tweets": [one for one in tweets if one["username"] == username]}

    @offered
    def search_tweets(self, keyword: str) -> Any:
        tweets = self.data["tweets"].values()
        found = [one for one in tweets if keyword.lower() in one["content"].lower()]
        return {"matching_tweets": found}

    @offered
    def get_user_stats(self, username: str) -> Any:
        tweets = self.data["tweets"].values()
        own = username == self.data["username"]
        return {
            "tweet_count": sum(one["username"] == username for one in tweets),
            "following_count": len(self.data["following_list"]) if own else 0,
            "retweet_count": len(self.data["retweets"].get(username, [])),
        }
